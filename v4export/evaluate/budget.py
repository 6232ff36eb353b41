"""What an evaluation needs in memory, worked out before it begins."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

from v4export.checkpoint.audit import in_graph
from v4export.config import ModelConfig
from v4export.errors import NotEnough
from v4export.evaluate.lane import Lane

#: Bytes of what a step makes on its way, and of float64 predictions; at least one window, and one token.
STEP_BYTES, PREDICTION_BYTES = 512 << 20, 256 << 20
#: Times that the largest matrix to be rounded is there at once, in float32: itself, what is tried and what is best.
_ROUNDING = 10
#: Predictions of the reference and a recipe, their products, in float64.
_PREDICTIONS = 6


@dataclass(frozen=True)
class Budget:
    """How the work is cut.

    Attributes:
        windows: that pass a layer at once.
        chunk: tokens whose predictions are made at once.
        part_bytes: of the largest part, in float32 and in a recipe's type, and of what computing it takes.
        store_bytes: of all hidden states.
        on_disk: whether those wait in files.
    """

    windows: int
    chunk: int
    part_bytes: int
    store_bytes: int
    on_disk: bool


def budget(reference: Lane, lanes: Sequence[Lane], context: int, windows: int) -> Budget:
    """How to cut the work so that memory suffices.

    Raises:
        NotEnough: memory for one layer, or disk for hidden states, does not suffice.
    """
    config = reference.config
    step = _step_bytes(config, context)
    count = min(windows, max(1, STEP_BYTES // step))
    chunk = max(1, PREDICTION_BYTES // (config.vocab_size * 8 * _PREDICTIONS))
    largest, name = _largest_part(reference)
    itemsize = max((lane.dtype.itemsize for lane in lanes), default=0)
    matrix = max(math.prod(w.shape) for w in reference.weights.values() if w.role in ("linear", "expert"))
    part = largest * (4 + itemsize) + matrix * 4 * _ROUNDING + step * count
    part += min(chunk, windows * context) * config.vocab_size * 8 * _PREDICTIONS
    free = psutil.virtual_memory().available
    if part > free:
        raise NotEnough(
            f"{name} does not fit into memory",
            f"{_gib(part)}: {largest:,} numbers in float32 and {itemsize} bytes each for a recipe, and what is "
            f"computed with them; {_gib(free)} are free",
            "use a machine with more memory; a layer at a time is all that is ever loaded",
        )
    hidden = math.prod(config.hidden_shape) * windows * context
    store = hidden * (2 * 4 + sum(lane.dtype.itemsize for lane in lanes))
    on_disk = store > (free - part) // 2
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if on_disk and store > disk:
        raise NotEnough(
            "hidden states fit neither into memory nor onto the disk",
            f"{_gib(store)} for {len(lanes)} recipes; {_gib(free - part)} of memory and {_gib(disk)} of "
            f"{tempfile.gettempdir()} are free",
            "give fewer --tokens or fewer recipes with --precision, or another TMPDIR",
        )
    return Budget(count, chunk, part, store, on_disk)


def _largest_part(reference: Lane) -> tuple[int, str]:
    """Numbers in the largest layer, or embedding, or head; and what it is."""
    sizes: dict[str, int] = defaultdict(int)
    for weight in in_graph(reference.weights, reference.config).values():
        words = weight.name.split(".")
        sizes[f"layer {words[2]}" if words[1] == "layers" else "the embedding or the head"] += math.prod(weight.shape)
    name = max(sizes, key=lambda one: sizes[one])
    return sizes[name], name


def _step_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of what one window's tokens make in a layer, at most: scores, gathered rows, and a few hidden states."""
    width = config.compressed.head_dim if config.compressed else config.latent_dim
    scores = 3 * config.num_heads * (context + width)
    if config.indexer:
        scores += 2 * min(config.indexer.top_k, context) * width + 3 * config.indexer.num_heads * context
    inner = max(config.intermediate_size, config.moe_intermediate_size * config.experts_per_token)
    rest = 8 * math.prod(config.hidden_shape) + 4 * inner
    return context * (scores + rest) * np.dtype(np.float32).itemsize


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
