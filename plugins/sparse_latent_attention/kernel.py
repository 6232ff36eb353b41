"""sparse_latent_attention as two kernels: shares of the rows, then their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.attention import combine, split

SPLIT = split(
    "SparseLatentAttentionSplit",
    Path(__file__).with_name("kernel.cu"),
    ("q T M H W", "new T B S W", "cache T B T W", "selected int64 M K", "position int64 B"),
    scalars="S T K",
    rows=lambda d: d.K,
    values="L",
)


def kernels(call: Any, q, new, cache, selected, position, latent_width, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    shares = call(SPLIT, q, new, cache, selected, position, L=latent_width, SCALE=float(scale))
    return combine(call, shares, call.dtype_of(q))
