"""thought_attention as two kernels: shares of the rows, then their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split

# A thought's own steps are O here: P is the number of splits.
SPLIT = split(
    "ThoughtAttentionSplit",
    Path(__file__).with_name("kernel.cu"),
    ("q T M H W", "own T M O W", "cache T B T W", "thought_at int64 B Q"),
    scalars="T Q O",
    rows=lambda d: d["T"] + d.O,
    values="L",
)


def kernels(call: Any, q, own, cache, thought_at, latent_width, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return combine(call, call(SPLIT, q, own, cache, thought_at, L=latent_width, SCALE=float(scale)), call.dtype_of(q))
