"""How many parameters a configuration has, in all and at work for one token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from v4export.checkpoint.names import Expected, expected
from v4export.config import ModelConfig
from v4export.state_contract import may_skip_decoder


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model; ``by_part`` sums to ``total``.

    Attributes:
        total: all of them.
        active: at work for one token, without a thought.
        by_part: parts and their parameters.
        active_remembering: at work for a token that does not pass the decoder; None where there is no decoder to skip.
    """

    total: int
    active: int
    by_part: dict[str, int]
    active_remembering: int | None = None


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
    if ".reasoning." in one.name:
        return "reasoning_layers" if ".layers." in one.name else "reasoning_head"
    if ".engram." in one.name and one.role != "engram_table":
        return "engram_fusion"  # its norms as well
    return _PARTS.get(one.role) or next(part for piece, part in _NAMED_PARTS.items() if piece in one.name)


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Counts as transformers does: router biases and hash tables are buffers and prediction layers are left out.

    A token is worked on by everything but the embedding and Engram's tables (rows are looked up) and the experts it is
    not routed to. Thoughts are counted by themselves: each step of one works on ``reasoning_layers`` besides, and its
    end on ``reasoning_head``.
    """
    own = expected(replace(config, drafts=False)).values()
    parameters = [one for one in own if one.role not in _BUFFERS]
    by_part = _by_part(parameters)
    remembering = None
    if may_skip_decoder(config):
        remembering = _active(_by_part([one for one in parameters if remembers(one, config)]), config)
    return ParameterCounts(sum(by_part.values()), _active(by_part, config), by_part, remembering)


def _by_part(parameters: Iterable[Expected]) -> dict[str, int]:
    by_part: dict[str, int] = {}
    for one in parameters:
        by_part[_part(one)] = by_part.get(_part(one), 0) + math.prod(one.shape)
    return by_part


def _active(by_part: dict[str, int], config: ModelConfig) -> int:
    experts = by_part.get("routed_experts", 0)
    idle = experts - experts // config.num_experts * config.experts_per_token
    # A tied embedding is also the head, which every token is multiplied with.
    looked_up = 0 if config.tie_word_embeddings else by_part["embedding"]
    apart = sum(by_part.get(part, 0) for part in ("engram_tables", "reasoning_layers", "reasoning_head"))
    return sum(by_part.values()) - idle - looked_up - apart


#: What makes entries and index keys in the decoder's first layer.
_MAKES_ENTRIES = (
    "input_layernorm",
    "self_attn.compressor",
    "self_attn.indexer.wk",
    "self_attn.indexer.k_norm",
    "engram",
)


def remembers(one: Expected, config: ModelConfig) -> bool:
    """Whether a parameter is at work for a token that does not pass the decoder."""
    place = one.name.split(".", 3)
    if place[1] != "layers":
        return one.role == "embedding"
    layer = int(place[2])
    if not config.is_decoder(layer):
        return True
    return not config.is_decoder(layer - 1) and place[3].startswith(_MAKES_ENTRIES)
