"""What the attentions' kernels share: tiles, splits, and the kernel that joins what the splits left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import ACTIVATIONS, Constant, Kernel, Sizes
from v4export.plugins.kernels.size import Size, cdiv, least, most

#: (heads, rows, stages) of a tile, the first whose shared memory a launch may have is taken.
TILES = ((64, 32, 2), (32, 32, 2), (32, 16, 2), (16, 32, 2), (16, 16, 2), (16, 16, 1))
#: Blocks that fill a GPU: two for each of the 132 multiprocessors of an H200.
_BLOCKS = 264
#: Rows that a split has at least, so that reading them outweighs joining.
_ROWS_OF_SPLIT = 128


def split(
    name: str,
    source: Path,
    inputs: Sequence[str],
    *,
    scalars: str,
    rows: Callable[[Sizes], Size | int],
    values: str = "W",
) -> Kernel:
    """A kernel that attends to rows in splits; its outputs are what ``combine`` takes.

    Args:
        name: of its nodes.
        source: defines which rows a query sees.
        inputs: the first is q [M H W].
        scalars: dimensions that the source reads, before the number of splits.
        rows: at most how many a query sees.
        values: the dimension that is the width of a row's value.
    """
    return Kernel(
        name,
        source,
        inputs=inputs,
        outputs=(f"partial float32 M P H {values}", "extent float32 M P H 2"),
        compiled=" ".join(dict.fromkeys(["H", "W", values])),
        scalars=f"{scalars} P",
        choose=lambda d: {**_tiles(d), "VALUES": d[values]},
        derived={
            "P": lambda d: most(1, least(cdiv(rows(d), _ROWS_OF_SPLIT), cdiv(_BLOCKS, most(1, d.M * _groups(d)))))
        },
        grid=lambda d: (d.M, _groups(d), d.P),
        threads=lambda d: 128 if d.HEADS == 16 else 256,
        shared=_shared,
    )


def _groups(d: Sizes) -> int:
    return -(-int(d.H) // int(d.HEADS))


def _tiles(d: Sizes) -> Mapping[str, Constant]:
    most_heads = -(-d.H // 16) * 16
    fitting = [dict(zip(("HEADS", "ROWS", "STAGES"), tile, strict=True)) for tile in TILES if tile[0] <= most_heads]
    return next((tile for tile in fitting if _shared(Sizes(d | tile)) <= d.budget), fitting[-1])


def _shared(d: Sizes) -> int:
    """Bytes of ``Shared`` in attention.cuh."""
    number = 4 if d.type_T == ACTIVATIONS[0] else 2
    pad = 16 // number
    pitch = -(-d.W // 16) * 16 + pad
    numbers = d.HEADS * pitch + d.STAGES * d.ROWS * pitch + d.HEADS * (d.ROWS + pad)
    return int(number * numbers + 4 * (d.HEADS * d.ROWS + 3 * d.HEADS + d.STAGES * d.ROWS))


def _combine(sinks: bool) -> Kernel:
    return Kernel(
        "AttentionCombineSinks" if sinks else "AttentionCombine",
        Path(__file__).with_name("attention_combine.cu"),
        inputs=("partial float32 M P H L", "extent float32 M P H 2", *(("sinks float32 H",) if sinks else ())),
        outputs=("z T M H L",),
        compiled="H L",
        scalars="P",
        choose=lambda _: {"SINKS": int(sinks)},
        grid=lambda d: (d.M, d.H),
    )


COMBINE, COMBINE_SINKS = _combine(False), _combine(True)


def combine(call: Any, shares: Any, dtype: str, sinks: Any = None) -> Any:
    """z [M, H, L] of type ``dtype`` from what a split kernel left, its outputs: a tuple of one."""
    if sinks is None:
        return call(COMBINE, *shares, TYPE=dtype)
    return call(COMBINE_SINKS, *shares, sinks, TYPE=dtype)
