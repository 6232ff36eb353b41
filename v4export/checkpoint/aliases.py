"""What checkpoints call the tensors of the vocabulary: DeepSeek-V4's own names, and those transformers saves.

Two columns: stored, canonical. DeepSeek writes the left one; transformers writes it below ``model.`` for a layer, with
the canonical names around the layers. ``.scale`` is the multipliers of the ``.weight`` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from v4export.checkpoint.names import SCALE
from v4export.checkpoint.names_draft import STORED
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import ModelConfig
from v4export.errors import BadInput

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Below layers.{i}. and model.layers.{i}.
_LAYER = {
    "engram.embed.weight": "engram.embed.weight",
    "engram.wkv.weight": "engram.wkv.weight",
    "engram.q_weight": "engram.q_weight",
    "engram.k_weight": "engram.k_weight",
    "engram.conv.norm": "engram.conv.norm",
    "engram.conv.weight": "engram.conv.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "attn_norm.weight": "input_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.experts.{e}.w1.weight": "mlp.experts.{e}.gate_proj.weight",
    "ffn.experts.{e}.w2.weight": "mlp.experts.{e}.down_proj.weight",
    "ffn.experts.{e}.w3.weight": "mlp.experts.{e}.up_proj.weight",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
# DeepSeek-V4.1's, where they differ: index keys are made of entries, so an indexer is no compressor.
_LAYER_V41 = {
    "attn.indexer.wk.weight": "self_attn.indexer.wk.weight",
    "attn.indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.indexer.wq_b.weight",
    "attn.indexer.weights_proj.weight": "self_attn.indexer.weights_proj.weight",
}
# transformers' conversion back to DeepSeek's names shortens every kv_norm.
_ALSO = {"attn.norm.weight": "self_attn.kv_norm.weight"}

# Of DeepSeek-V4's first prediction layer, below mtp.0., besides those of any layer.
_DRAFTER = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
    "norm.weight": "shared_head.norm.weight",
}

_READ = _LAYER | _ALSO
_READ_DRAFTER = _READ | _DRAFTER
_READ_V41 = _LAYER | _LAYER_V41
_WRITTEN = {canonical: stored for stored, canonical in [*(_TOP | _LAYER).items(), *_LAYER_V41.items()]}
_WRITTEN_DRAFTER = _WRITTEN | {canonical: stored for stored, canonical in _DRAFTER.items()}
_STORED_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_CANONICAL_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def _renamed(leaf: str, table: Mapping[str, str]) -> str | None:
    """The table's right column for a name, an expert's number standing for ``{e}``."""
    expert = _EXPERT.search(leaf)
    found = table.get(_EXPERT.sub("{e}", leaf, count=1))
    return found.replace("{e}", expert[0]) if found and expert else found


def _canonical(name: str, table: Mapping[str, str]) -> str | None:
    if name in _TOP:
        return _TOP[name]
    layer = _STORED_LAYER.fullmatch(name)
    leaf = _renamed(layer[2], table) if layer else None
    return f"model.layers.{layer[1]}.{leaf}" if layer and leaf else None


def canonical(name: str, shared_entries: bool = False) -> str:
    """The vocabulary's name for a stored one; a name that is not in the table stays as it is.

    Args:
        name: stored.
        shared_entries: whether layers share entries, as in DeepSeek-V4.1, where some names mean other tensors.
    """
    return _canonical_or_same(name, _READ_V41 if shared_entries else _READ)


def _canonical_or_same(name: str, table: Mapping[str, str]) -> str:
    for ending, weight in ((".scale", ".weight"), (SCALE, "")):
        if name.endswith(ending):
            found = _canonical(name.removesuffix(ending) + weight, table)
            if found and found.endswith(".weight"):
                return found + SCALE
    return _canonical(name, table) or name


def native(name: str, drafter: int | None = None) -> str:
    """DeepSeek's name for one of the vocabulary; a name that is not in the table stays as it is.

    Args:
        name: canonical.
        drafter: number of the layer that drafts, if there is one.
    """
    weight = name.removesuffix(SCALE)
    layer = _CANONICAL_LAYER.fullmatch(weight)
    drafts = layer is not None and int(layer[1]) == drafter
    leaf = _renamed(layer[2] if layer else weight, _WRITTEN_DRAFTER if drafts else _WRITTEN)
    if leaf is None:
        return name
    stored = f"{STORED}{leaf}" if drafts else f"layers.{layer[1]}.{leaf}" if layer else leaf
    return stored if weight == name else stored.removesuffix(".weight") + ".scale"


def by_canonical_name(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stored tensors by the vocabulary's names; each keeps its stored name.

    Raises:
        BadInput: two names mean the same tensor.
    """
    if config.compressed is None:
        return dict(tensors)
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        name = canonical(stored, config.compressed.shared is not None)
        if name in found:
            raise BadInput("a tensor is stored under two names", f"{name} is {found[name].name} and {stored}")
        found[name] = tensor
    return found


def with_drafter(config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stored tensors, those of DeepSeek-V4's first prediction layer by the vocabulary's names if it is to draft."""
    if config.compressed is None or not config.drafts:
        return dict(tensors)
    layer = f"layers.{config.num_layers}."
    found = {}
    for name, tensor in tensors.items():
        of_layer = name.startswith(STORED)
        found[_canonical_or_same(layer + name.removeprefix(STORED), _READ_DRAFTER) if of_layer else name] = tensor
    return found
