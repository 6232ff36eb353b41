"""window_attention as two kernels: shares of the rows, then their sum with the sink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split

_SOURCE = Path(__file__).with_name("kernel.cu")
_INPUTS = ("q T M H W", "new T B S W", "ring T B R W", "position int64 B")
SPLIT = split("WindowAttentionSplit", _SOURCE, _INPUTS, scalars="S R", rows=lambda d: d.R)
SPLIT_SINCE = split(
    "WindowAttentionSinceSplit", _SOURCE, (*_INPUTS, "since int64 B"), scalars="S R", rows=lambda d: d.R
)


def kernels(call: Any, q, new, ring, position, sinks, scale, since=None):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    operands = (q, new, ring, position)
    if since is None:
        shares = call(SPLIT, *operands, SCALE=float(scale), SINCE=0)
    else:
        shares = call(SPLIT_SINCE, *operands, since, SCALE=float(scale), SINCE=1)
    return combine(call, shares, call.dtype_of(q), sinks)
