"""latent_attention as two kernels: shares of the rows, then their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split

SPLIT = split(
    "LatentAttentionSplit",
    Path(__file__).with_name("kernel.cu"),
    ("q T M H W", "new T B S W", "cache T B T W", "position int64 B"),
    scalars="S T",
    rows=lambda d: d["T"] + d.S,
    values="L",
)


def kernels(call: Any, q, new, cache, position, latent_width, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return combine(call, call(SPLIT, q, new, cache, position, L=latent_width, SCALE=float(scale)), call.dtype_of(q))
