"""V4's and V4.1's part of the vocabulary: attention with compressed entries, hyper-connections, and hash routing.

The names are those of transformers' modules. What checkpoints call the same tensors is in ``aliases.py``.
"""

from __future__ import annotations

from collections.abc import Callable

from v4export.checkpoint.table import Table
from v4export.config import (
    CSA,
    FULL,
    HCA,
    REINDEX,
    REUSE,
    WINDOW,
    CompressedAttention,
    HyperConnections,
    Indexer,
    ModelConfig,
)


def _attention(config: ModelConfig) -> CompressedAttention:
    assert config.compressed is not None
    return config.compressed


def _ratio(kind: str) -> Callable[[ModelConfig], int]:
    """Tokens of an entry of this kind of layer, which is the same in all of them."""

    def ratio(config: ModelConfig) -> int:
        c = _attention(config)
        return c.ratios[c.layers.index(kind)]

    return ratio


def _index(config: ModelConfig) -> Indexer:
    assert config.indexer is not None
    return config.indexer


def _hyper(config: ModelConfig) -> HyperConnections:
    assert config.hyper is not None
    return config.hyper


def _inner(config: ModelConfig) -> int:
    """Width of all query heads."""
    return config.num_heads * _attention(config).head_dim


def _low_rank(config: ModelConfig) -> int:
    """Width between the two output projections."""
    return _attention(config).o_groups * _attention(config).o_lora_rank


def _mixes(config: ModelConfig) -> int:
    """Coefficients of a sublayer: what it reads of each stream, what it adds to each, and how streams mix."""
    return (2 + _hyper(config).streams) * _hyper(config).streams


def _flat(config: ModelConfig) -> int:
    """Width of all streams of a token."""
    return _hyper(config).streams * config.hidden_size


def _streams(name: str) -> Table:
    return {
        f"{name}.fn": (lambda c: (_mixes(c), _flat(c)), "hyper"),
        f"{name}.base": (lambda c: (_mixes(c),), "hyper"),
        f"{name}.scale": (lambda c: (3,), "hyper"),
    }


def _compressor(
    prefix: str, width: Callable[[ModelConfig], int], ratio: Callable[[ModelConfig], int], halves: int
) -> Table:
    """Entries that stand for several tokens; they overlap where a token has two halves."""
    return {
        f"{prefix}.kv_proj.weight": (lambda c: (halves * width(c), c.hidden_size), "projection"),
        f"{prefix}.gate_proj.weight": (lambda c: (halves * width(c), c.hidden_size), "projection"),
        f"{prefix}.position_bias": (lambda c: (ratio(c), halves * width(c)), "position_bias"),
        f"{prefix}.kv_norm.weight": (lambda c: (width(c),), "norm"),
    }


ATTENTION_STREAMS = _streams("attn_hc")
FEED_FORWARD_STREAMS = _streams("ffn_hc")
HEAD_STREAMS: Table = {
    "model.hc_head.hc_fn": (lambda c: (_hyper(c).streams, _flat(c)), "hyper"),
    "model.hc_head.hc_base": (lambda c: (_hyper(c).streams,), "hyper"),
    "model.hc_head.hc_scale": (lambda c: (1,), "hyper"),
}
_QUERY_KEY: Table = {
    "self_attn.q_a_proj.weight": (lambda c: (c.q_lora_rank or 0, c.hidden_size), "linear"),
    "self_attn.q_a_norm.weight": (lambda c: (c.q_lora_rank or 0,), "norm"),
    "self_attn.q_b_proj.weight": (lambda c: (_inner(c), c.q_lora_rank or 0), "linear"),
    "self_attn.kv_proj.weight": (lambda c: (_attention(c).head_dim, c.hidden_size), "linear"),
    "self_attn.kv_norm.weight": (lambda c: (_attention(c).head_dim,), "norm"),
}
_COMPRESSOR = "self_attn.compressor"
_INDEXER: Table = {
    f"{_COMPRESSOR}.indexer.q_b_proj.weight": (
        lambda c: (_index(c).num_heads * _index(c).head_dim, c.q_lora_rank or 0),
        "linear",
    ),
    **_compressor(f"{_COMPRESSOR}.indexer", lambda c: _index(c).head_dim, _ratio(CSA), 2),
    f"{_COMPRESSOR}.indexer.scorer.weights_proj.weight": (
        lambda c: (_index(c).num_heads, c.hidden_size),
        "projection",
    ),
}
_OUTPUT: Table = {
    "self_attn.sinks": (lambda c: (c.num_heads,), "sink"),
    "self_attn.o_a_proj.weight": (lambda c: (_low_rank(c), _inner(c) // _attention(c).o_groups), "linear"),
    "self_attn.o_b_proj.weight": (lambda c: (c.hidden_size, _low_rank(c)), "linear"),
}
# Of DeepSeek-V4.1: entries are pooled without regard to a token's place, and index keys are projected from entries.
_SOURCE: Table = {
    f"{_COMPRESSOR}.kv_proj.weight": (lambda c: (_attention(c).head_dim, c.hidden_size), "projection"),
    f"{_COMPRESSOR}.kv_norm.weight": (lambda c: (_attention(c).head_dim,), "norm"),
}
_SOURCE_GATE: Table = {
    f"{_COMPRESSOR}.gate_proj.weight": (lambda c: (_attention(c).head_dim, c.hidden_size), "projection"),
}
_INDEX_KEYS: Table = {
    "self_attn.indexer.wk.weight": (lambda c: (_index(c).head_dim, _attention(c).head_dim), "projection"),
    "self_attn.indexer.k_norm.weight": (lambda c: (_index(c).head_dim,), "norm"),
}
_INDEX_QUERIES: Table = {
    "self_attn.indexer.wq_b.weight": (
        lambda c: (_index(c).num_heads * _index(c).head_dim, c.q_lora_rank or 0),
        "linear",
    ),
    "self_attn.indexer.weights_proj.weight": (lambda c: (_index(c).num_heads, c.hidden_size), "projection"),
}
# kind of layer -> what it has beside a window
_ENTRIES: dict[str, list[Table]] = {
    WINDOW: [],
    CSA: [_compressor(_COMPRESSOR, lambda c: _attention(c).head_dim, _ratio(CSA), 2), _INDEXER],
    HCA: [_compressor(_COMPRESSOR, lambda c: _attention(c).head_dim, _ratio(HCA), 1)],
    FULL: [_SOURCE, _INDEX_KEYS, _INDEX_QUERIES],
    REINDEX: [_INDEX_QUERIES],
    REUSE: [],
}
#: Which experts a token id is routed to.
HASH_TABLE: Table = {"mlp.gate.tid2eid": (lambda c: (c.vocab_size, c.experts_per_token), "hash_table")}


def attention_tables(attention: CompressedAttention, layer: int) -> list[Table]:
    """The tables of one layer's attention, in reading order."""
    kind = attention.layers[layer]
    gate = [_SOURCE_GATE] if kind == FULL and attention.ratios[layer] > 1 else []
    return [_QUERY_KEY, *gate, *_ENTRIES[kind], _OUTPUT]
