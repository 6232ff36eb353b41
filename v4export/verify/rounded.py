"""A checkpoint's weight as the graph holds it, recomputed from the checkpoint and never read back from the graph.

A reference that read the graph's own bytes would agree with a graph that points at the wrong ones.
"""

from __future__ import annotations

import numpy as np

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.formats import dequantize_blocks, dequantize_fp4, quantize_blocks, quantize_fp4
from v4export.graphs.weights import FP4, numpy_dtype, stored_as
from v4export.precision import Precision


def as_the_graph_holds(weight: Weight, precision: Precision) -> np.ndarray:
    """The values float32 after conversion to the graph's dtype for this weight; integers as int64."""
    dtype = precision.weight_dtype(weight.role)
    values = weight.decode()
    if dtype == "int64" or stored_as(weight, dtype):
        return values
    if dtype == FP4:
        return dequantize_fp4(*quantize_fp4(values))
    if dtype == "float8_e4m3fn" and precision.fp8:
        block = (precision.fp8.rows, precision.fp8.columns)
        return dequantize_blocks(*quantize_blocks(values, *block, power_of_two=precision.fp8.power_of_two), block)
    return values.astype(numpy_dtype(dtype)).astype(np.float32)


def is_converted(weight: Weight, precision: Precision) -> bool:
    """Whether the graph holds other values than the checkpoint; widening loses nothing."""
    dtype = precision.weight_dtype(weight.role)
    return dtype not in ("float32", "int64") and not stored_as(weight, dtype)
