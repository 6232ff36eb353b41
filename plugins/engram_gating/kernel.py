"""engram_gating as a kernel."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import C_TYPES, Constant, Kernel, Sizes

_THREADS = 512


def _tiles(d: Sizes) -> dict[str, Constant]:
    """Numbers that a thread moves at once, and how often it does for a row."""
    vector = gcd(d.D, 4 if d.type_T == "float32" else 8)
    return {"VEC": vector, "ROUNDS": -(-d.D // (vector * _THREADS))}


GATING = Kernel(
    "EngramGating",
    Path(__file__).with_name("kernel.cu"),
    inputs=("streams T M X D", "keys T M X D", "value T M D", "q_weight * X D", "k_weight * X D"),
    outputs=("gated T M X D",),
    compiled="X D",
    choose=_tiles,
    grid=lambda d: (d.M, d.X),
    threads=lambda d: 32 * -(-d.D // (d.VEC * 32 * d.ROUNDS)),
)


def kernels(call: Any, streams, keys, value, q_weight, k_weight, eps):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    q_type, k_type = (C_TYPES[call.dtype_of(weight)] for weight in (q_weight, k_weight))
    return call(GATING, streams, keys, value, q_weight, k_weight, EPS=float(eps), Q_TYPE=q_type, K_TYPE=k_type)
