"""A checkpoint's weight as the graph holds it, recomputed from the checkpoint and never read back from the graph.

A reference that read the graph's own bytes would agree with a graph that points at the wrong ones.
"""

from __future__ import annotations

import numpy as np

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.narrow import narrow, outer_scale, widen
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.weights import stored_as
from v4export.precision import Precision


def as_the_graph_holds(weight: Weight, precision: Precision) -> np.ndarray:
    """The values float32 after conversion to the graph's format for this weight; integers as int64."""
    return rounded(weight.decode(), weight, precision)


def rounded(values: np.ndarray, weight: Weight, precision: Precision) -> np.ndarray:
    """The same of a weight whose own values are there already."""
    format = precision.format_of(weight.name, weight.role)
    if format.dtype == "int64" or stored_as(weight, format):
        return values
    if format.scaled:
        scale_2 = outer_scale(float(np.abs(values).max())) if format.outer else None
        return widen(narrow(values, format, scale_2), format)
    return values.astype(numpy_dtype(format.dtype)).astype(np.float32)


def is_converted(weight: Weight, precision: Precision) -> bool:
    """Whether the graph holds other values than the checkpoint; widening loses nothing."""
    format = precision.format_of(weight.name, weight.role)
    return format.dtype not in ("float32", "int64") and not stored_as(weight, format)
