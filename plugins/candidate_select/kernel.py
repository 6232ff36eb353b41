"""candidate_select as kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.index_select.kernel import SCORE, TOP_K
from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.kernels.size import cdiv, most

_THREADS = 128
#: Blocks of keys for a lane.
_EACH = 4

BLOCK_SCORE = Kernel(
    "BlockScore",
    Path(__file__).with_name("kernel.cu"),
    inputs=("scores float32 M N", "position int64 B"),
    outputs=("best float32 M K",),
    scalars="S N",
    choose=lambda d: {"LANES": min(32, 1 << (d.BLOCK.bit_length() - 1)), "EACH": _EACH},
    derived={"S": lambda d: d.M // most(d.B, 1), "K": lambda d: cdiv(d.N, d.BLOCK)},
    grid=lambda d: (d.M, cdiv(d.K, _EACH * _THREADS // d.LANES)),
    threads=lambda d: _THREADS,
)


def kernels(call: Any, q, weights, new, cache, position, top_k, ratio, scale, top_blocks, block_size):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    (scores,) = call(SCORE, q, weights, new, cache, position, RATIO=ratio, SCALE=float(scale))
    (numbers,) = call(TOP_K, scores, TOP=top_k)
    (best,) = call(BLOCK_SCORE, scores, position, RATIO=ratio, BLOCK=block_size)
    (blocks,) = call(TOP_K, best, TOP=top_blocks)
    return numbers, blocks
