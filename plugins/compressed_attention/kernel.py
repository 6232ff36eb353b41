"""compressed_attention as two kernels: shares of the rows, then their sum with the sink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split

SPLIT = split(
    "CompressedAttentionSplit",
    Path(__file__).with_name("kernel.cu"),
    ("q T M H W", "new T B S W", "ring T B R W", "new_entry T B U W", "entry T B C W", "position int64 B"),
    scalars="S R U C",
    rows=lambda d: d.R + d.C + d.U,
)


def kernels(call: Any, q, new, ring, new_entry, entry, position, sinks, ratio, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    shares = call(SPLIT, q, new, ring, new_entry, entry, position, RATIO=ratio, SCALE=float(scale))
    return combine(call, shares, call.dtype_of(q), sinks)
