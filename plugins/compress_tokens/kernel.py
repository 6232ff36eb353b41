"""compress_tokens as a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Kernel, Sizes
from v4export.plugins.kernels.size import cdiv


def _warps(d: Sizes) -> int:
    """How many warps share an entry's tokens: four tokens each, or more than that if there are many."""
    return min(8, -(-d.HALVES * d.RATIO // 4))


COMPRESS = Kernel(
    "CompressTokens",
    Path(__file__).with_name("kernel.cu"),
    inputs=("rows float32 B S P", "ring float32 B R P", "bias float32 PLACES HALF", "position int64 B"),
    outputs=("entries float32 B U W",),
    compiled="P",
    scalars="S",
    choose=lambda d: {"CHUNK": min(8, -(-d.HALVES * d.RATIO // _warps(d)))},
    derived={"U": lambda d: cdiv(d.S, d.RATIO), "W": lambda d: d.P // (2 * d.HALVES)},
    grid=lambda d: (d.U * d.B, cdiv(d.W, 32)),
    threads=lambda d: 32 * _warps(d),
)


def kernels(call: Any, rows, ring, bias, position, ratio, halves):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return call(COMPRESS, rows, ring, bias, position, RATIO=ratio, HALVES=halves)
