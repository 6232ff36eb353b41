"""index_reselect as kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.index_select.kernel import SCORE, SCORED, TOP_K
from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.kernels.size import cdiv

MARKS = Kernel(
    "BlockMarks",
    Path(__file__).with_name("marks.cu"),
    inputs=("blocks int64 M J", "fresh * B U I", "cache * B C I"),  # keys for their number alone
    outputs=("marks int32 M W",),
    scalars="J W",
    derived={"W": lambda d: cdiv(cdiv(d.C + d.U, d.BLOCK), 32)},
    grid=lambda d: (d.M,),
    threads=lambda d: 512,
)

RESCORE = Kernel(
    "IndexRescore",
    Path(__file__).with_name("kernel.cu"),
    inputs=(*SCORE.inputs[:4], "marks int32 M W", SCORE.inputs[4]),
    outputs=SCORE.outputs,
    compiled=SCORE.compiled,
    scalars=f"{SCORE.scalars} W",
    choose=SCORE.choose,
    derived=SCORED,
    grid=SCORE.grid,
    threads=SCORE.threads,
)


def kernels(call: Any, q, weights, new, cache, blocks, position, top_k, ratio, scale, block_size):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    (marks,) = call(MARKS, blocks, new, cache, BLOCK=block_size)
    (scores,) = call(
        RESCORE, q, weights, new, cache, marks, position, RATIO=ratio, SCALE=float(scale), BLOCK=block_size
    )
    return call(TOP_K, scores, TOP=top_k)
