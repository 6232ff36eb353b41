"""sparse_attention as two kernels: shares of the rows, then their sum with the sink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split
from v4export.plugins.kernels.size import Size

_SOURCE = Path(__file__).with_name("kernel.cu")
_INPUTS = (
    "q T M H W",
    "new T B S W",
    "ring T B R W",
    "new_entry T B U W",
    "entry T B C W",
    "selected int64 M K",
    "position int64 B",
)


def _rows(d: Any) -> Size:
    return d.R + d.K


SPLIT = split("SparseAttentionSplit", _SOURCE, _INPUTS, scalars="S R U C K", rows=_rows)
SPLIT_SINCE = split("SparseAttentionSinceSplit", _SOURCE, (*_INPUTS, "since int64 B"), scalars="S R U C K", rows=_rows)


def kernels(call: Any, q, new, ring, new_entry, entry, selected, position, sinks, ratio, scale, since=None):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    operands, constants = (q, new, ring, new_entry, entry, selected, position), {"RATIO": ratio, "SCALE": float(scale)}
    if since is None:
        shares = call(SPLIT, *operands, SINCE=0, **constants)
    else:
        shares = call(SPLIT_SINCE, *operands, since, SINCE=1, **constants)
    return combine(call, shares, call.dtype_of(q), sinks)
