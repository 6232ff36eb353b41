"""How many parameters a configuration has, in all and at work for one token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from v4export.checkpoint.names import Expected, expected
from v4export.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model; ``by_part`` sums to ``total``."""

    total: int
    active: int
    by_part: dict[str, int]


# role -> part; others are told apart by their name
_PARTS = {
    "embedding": "embedding",
    "head": "head",
    "norm": "norms",
    "router": "router",
    "expert": "routed_experts",
    "hyper": "hyper_connections",
    "engram_table": "engram_tables",
}
_BUFFERS = {"router_bias", "hash_table"}
_NAMED_PARTS = {".self_attn.": "attention", ".shared_experts.": "shared_experts", ".mlp.": "dense_mlp"}


def _part(one: Expected) -> str:
    if ".engram." in one.name and one.role != "engram_table":
        return "engram_fusion"  # its norms as well
    return _PARTS.get(one.role) or next(part for piece, part in _NAMED_PARTS.items() if piece in one.name)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts as transformers does: router biases and hash tables are buffers and prediction layers are left out.

    A token is worked on by everything but the embedding and Engram's tables (rows are looked up) and the experts it is
    not routed to.
    """
    by_part: dict[str, int] = {}
    for one in expected(config).values():
        if one.role not in _BUFFERS:
            by_part[_part(one)] = by_part.get(_part(one), 0) + math.prod(one.shape)
    total = sum(by_part.values())
    experts = by_part.get("routed_experts", 0)
    idle = experts - experts // config.num_experts * config.experts_per_token
    # A tied embedding is also the head, which every token is multiplied with.
    looked_up = 0 if config.tie_word_embeddings else by_part["embedding"]
    looked_up += by_part.get("engram_tables", 0)
    return ParameterCounts(total, total - idle - looked_up, by_part)
