"""What one decoded token of each sequence moves and computes in a layer, on one device: bytes and operations.

Letters as everywhere: B sequences, T cached tokens, E experts, K of them for a token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from v4export.config import CSA, FULL, HCA, REINDEX, REUSE, ModelConfig
from v4export.plan.sharding import share
from v4export.plan.work import Work
from v4export.state_contract import row_bytes, state_tensors

#: Parts of a layer, each of which has an efficiency of its own; ``head`` is beside the layers.
ATTENTION, EXPERTS, MATRICES, HEAD = "attention", "experts", "matrices", "head"


@dataclass(frozen=True)
class Load:
    """Bytes that are read from a device's memory, and operations (multiplications and additions) of products."""

    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(self.bytes + other.bytes, self.operations + other.operations)


def experts_hit(experts: int, chosen: int, tokens: int) -> float:
    """How many different experts so many tokens choose on average, if each chooses freely and evenly."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


class Loads:
    """The loads of a model's layers on one device of a stage; what depends on weights alone is added up once."""

    def __init__(self, work: Work) -> None:
        self.work, self.config = work, work.config
        self._head = f"{'model.embed_tokens' if work.config.tie_word_embeddings else 'lm_head'}.weight"
        self._held: dict[tuple[int, str], Load] = {}
        for name, nbytes in work.bytes.each.items():
            weight = work.inside.get(name)
            place = (-1, HEAD) if name == self._head else _place(name)
            if weight is None or place is None:
                continue
            numbers = math.prod(weight.shape) if len(weight.shape) > 1 else 0
            held = Load(share(name, nbytes, work.sharding), 2.0 * share(name, numbers, work.sharding))
            self._held[place] = self._held.get(place, Load()) + held

    def layer(self, layer: int, batch: int, context: int) -> dict[str, Load]:
        """Of one layer, by part."""
        found = {MATRICES: self._matrices(layer, MATRICES, batch), ATTENTION: self._attention(layer, batch, context)}
        if self.config.is_moe(layer):
            found[EXPERTS] = self._experts(layer, batch)
        return found

    def head(self, batch: int) -> dict[str, Load]:
        """Of the head, behind the last layer; a tied embedding is one, too."""
        return {HEAD: self._matrices(-1, HEAD, batch)}

    def _matrices(self, layer: int, part: str, batch: int) -> Load:
        held = self._held.get((layer, part), Load())
        return Load(held.bytes, batch * held.operations)

    def _experts(self, layer: int, batch: int) -> Load:
        c, held = self.config, self._held[layer, EXPERTS]
        hit = experts_hit(c.num_experts, c.experts_per_token, batch) / c.num_experts
        return Load(held.bytes * hit, held.operations * batch * c.experts_per_token / c.num_experts)

    def _attention(self, layer: int, batch: int, context: int) -> Load:
        heads = self.config.num_heads / self.work.sharding.tp
        total = Load()
        for rows, nbytes, widths, own_heads in rows_read(self.config, layer, context, self.work.itemsize):
            total += Load(rows * nbytes, 2.0 * rows * widths * (own_heads or heads))
        return Load(batch * total.bytes, batch * total.operations)


def _place(name: str) -> tuple[int, str] | None:
    """The layer and the part that a weight is at work in; None outside of layers."""
    words = name.split(".")
    if words[1] != "layers":
        return None
    return int(words[2]), EXPERTS if ".mlp.experts." in name else MATRICES


def rows_read(
    config: ModelConfig, layer: int, context: int, itemsize: int
) -> Iterator[tuple[int, int, int, int | None]]:
    """What a token's attention reads: rows, bytes of one, numbers of one that are multiplied, and by how many heads if
    these are not the model's own.
    """
    c, index = config.compressed, config.indexer
    if c is None:
        if index:
            yield context, _row(config, layer, "index_key", itemsize), index.head_dim, index.num_heads
        rows = min(context, index.top_k) if index else context
        yield rows, _row(config, layer, "latent", itemsize), config.latent_dim + config.kv_lora_rank, None
        return
    kind, ratio = c.layers[layer], c.ratios[layer]
    yield min(c.window, context), _row(config, layer, "window", itemsize), 2 * c.head_dim, None
    keys = context // ratio if ratio else 0
    if not keys:
        return
    # A layer that makes no entries reads those of the last before it that does.
    source = next(i for i in range(layer, -1, -1) if c.layers[i] in (CSA, HCA, FULL))
    if index and kind in (CSA, FULL, REINDEX):
        among = keys
        if c.shared and c.shared.among_candidates(layer):
            among = min(keys, c.shared.candidate_blocks * c.shared.candidate_block_size)
        yield among, _row(config, source, "index_key", itemsize), index.head_dim, index.num_heads
    entries = min(index.top_k, keys) if index and kind in (CSA, FULL, REINDEX, REUSE) else keys
    yield entries, _row(config, source, "entry", itemsize), 2 * c.head_dim, None


@functools.cache
def _row(config: ModelConfig, layer: int, name: str, itemsize: int) -> int:
    """Bytes of a row of that name, all tensors that it is kept in."""
    return sum(row_bytes(t, itemsize) for t in state_tensors(config, layer) if t.rows == name)
