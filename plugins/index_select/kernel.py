"""index_select as kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Constant, Kernel, Sizes
from v4export.plugins.kernels.size import cdiv, least, most

_WARPS = 4
#: Of one sequence, queries that a block compares its keys with.
_QUERIES = 8
#: A key of top-k is 32 bits of score and 28 of column, in digits of 12 bits.
_BINS = 1 << 12


def tiles(d: Sizes) -> Mapping[str, Constant]:
    """Keys of a warp, in eights: so many that they take no more than 64 registers of a thread."""
    words = 4 * -(-d.I // 32) * (4 if d.type_T == "float32" else 1)
    return {"TILES": 4 if 4 * words <= 64 else 2 if 2 * words <= 64 else 1, "QUERIES": _QUERIES}


#: Dimensions of scores: new tokens of a sequence, and keys.
SCORED = {"S": lambda d: d.M // most(d.B, 1), "N": lambda d: d.C + d.U}


def blocks(d: Sizes) -> tuple[Any, ...]:
    """Blocks of threads that score: by keys, sequences and queries."""
    return cdiv(d.N, 8 * d.TILES * _WARPS), d.B, cdiv(d.S, _QUERIES)


SCORE = Kernel(
    "IndexScore",
    Path(__file__).with_name("score.cu"),
    inputs=("q T M H I", "weights float32 M H", "fresh T B U I", "cache T B C I", "position int64 B"),
    outputs=("scores float32 M N",),
    compiled="H I",
    scalars="S U C",
    choose=tiles,
    derived=SCORED,
    grid=blocks,
    threads=lambda d: 32 * _WARPS,
)

TOP_K = Kernel(
    "IndexTopK",
    Path(__file__).with_name("topk.cu"),
    inputs=("scores float32 M N",),
    outputs=("numbers int64 M K",),
    scalars="N",
    derived={"K": lambda d: least(d.TOP, d.N)},
    grid=lambda d: (d.M,),
    threads=lambda d: 1024,
    shared=lambda d: max(4 * _BINS, 8 << (d.TOP - 1).bit_length()),
)


def kernels(call: Any, q, weights, new, cache, position, top_k, ratio, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    (scores,) = call(SCORE, q, weights, new, cache, position, RATIO=ratio, SCALE=float(scale))
    return call(TOP_K, scores, TOP=top_k)
