"""The checkpoint vocabulary: a name for every tensor, experts one by one, shapes as functions of the configuration.

The names are the Hub's, or for DeepSeek-V4 those of transformers' modules (``names_v4.py``, ``aliases.py``). Each table
has two columns: a name, and (shape, role). Names are in reading order, as the data flows. Checkpoints that store a
layer's experts as one fused tensor are cut into this vocabulary; what a checkpoint may have beyond it is listed with
the reason it is not needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from v4export.checkpoint import names_draft, names_engram, names_reasoning, names_v4
from v4export.checkpoint.table import Table
from v4export.config import Indexer, ModelConfig
from v4export.config.hashes import layouts

SCALE = "_scale_inv"  # what an FP8 weight's name is followed by for its multipliers


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor a model needs.

    Role: linear, expert, router, router_bias, norm, embedding, head or bias; projection, a matrix that is never
    quantised; hyper, sink or position_bias, which are small and float32; hash_table, of integers; engram_table, of
    which a few rows are read for a token; convolution.
    """

    name: str
    shape: tuple[int, ...]
    role: str


EMBEDDING: Table = {"model.embed_tokens.weight": (lambda c: (c.vocab_size, c.hidden_size), "embedding")}
FINAL_NORM: Table = {"model.norm.weight": (lambda c: (c.hidden_size,), "norm")}
HEAD: Table = {"lm_head.weight": (lambda c: (c.vocab_size, c.hidden_size), "head")}

ATTENTION_NORM: Table = {"input_layernorm.weight": (lambda c: (c.hidden_size,), "norm")}
QUERY: Table = {"self_attn.q_proj.weight": (lambda c: (c.num_heads * c.qk_head_dim, c.hidden_size), "linear")}
QUERY_LOW_RANK: Table = {
    "self_attn.q_a_proj.weight": (lambda c: (c.q_lora_rank or 0, c.hidden_size), "linear"),
    "self_attn.q_a_proj.bias": (lambda c: (c.q_lora_rank or 0,), "bias"),
    "self_attn.q_a_layernorm.weight": (lambda c: (c.q_lora_rank or 0,), "norm"),
    "self_attn.q_b_proj.weight": (lambda c: (c.num_heads * c.qk_head_dim, c.q_lora_rank or 0), "linear"),
}
KEY_VALUE: Table = {
    "self_attn.kv_a_proj_with_mqa.weight": (lambda c: (c.latent_dim, c.hidden_size), "linear"),
    "self_attn.kv_a_proj_with_mqa.bias": (lambda c: (c.latent_dim,), "bias"),
    "self_attn.kv_a_layernorm.weight": (lambda c: (c.kv_lora_rank,), "norm"),
    "self_attn.kv_b_proj.weight": (
        lambda c: (c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "linear",
    ),
    "self_attn.o_proj.weight": (lambda c: (c.hidden_size, c.num_heads * c.v_head_dim), "linear"),
    "self_attn.o_proj.bias": (lambda c: (c.hidden_size,), "bias"),
}
FEED_FORWARD_NORM: Table = {"post_attention_layernorm.weight": (lambda c: (c.hidden_size,), "norm")}
DENSE: Table = {
    "mlp.gate_proj.weight": (lambda c: (c.intermediate_size, c.hidden_size), "linear"),
    "mlp.up_proj.weight": (lambda c: (c.intermediate_size, c.hidden_size), "linear"),
    "mlp.down_proj.weight": (lambda c: (c.hidden_size, c.intermediate_size), "linear"),
}
ROUTER: Table = {"mlp.gate.weight": (lambda c: (c.num_experts, c.hidden_size), "router")}
ROUTER_BIAS: Table = {"mlp.gate.e_score_correction_bias": (lambda c: (c.num_experts,), "router_bias")}
EXPERT: Table = {
    "mlp.experts.{e}.gate_proj.weight": (lambda c: (c.moe_intermediate_size, c.hidden_size), "expert"),
    "mlp.experts.{e}.up_proj.weight": (lambda c: (c.moe_intermediate_size, c.hidden_size), "expert"),
    "mlp.experts.{e}.down_proj.weight": (lambda c: (c.hidden_size, c.moe_intermediate_size), "expert"),
}
SHARED: Table = {
    "mlp.shared_experts.gate_proj.weight": (lambda c: (_shared_width(c), c.hidden_size), "linear"),
    "mlp.shared_experts.up_proj.weight": (lambda c: (_shared_width(c), c.hidden_size), "linear"),
    "mlp.shared_experts.down_proj.weight": (lambda c: (c.hidden_size, _shared_width(c)), "linear"),
}

INDEXER: Table = {
    "self_attn.indexer.wq_b.weight": (
        lambda c: (_index(c).num_heads * _index(c).head_dim, c.q_lora_rank or 0),
        "linear",
    ),
    "self_attn.indexer.wk.weight": (lambda c: (_index(c).head_dim, c.hidden_size), "linear"),
    "self_attn.indexer.k_norm.weight": (lambda c: (_index(c).head_dim,), "norm"),
    "self_attn.indexer.k_norm.bias": (lambda c: (_index(c).head_dim,), "norm"),
    "self_attn.indexer.weights_proj.weight": (lambda c: (_index(c).num_heads, c.hidden_size), "projection"),
}

# A fused tensor [E, ...], and which of an expert's projections lie in it one after another along the next axis.
FUSED: dict[str, tuple[str, ...]] = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.experts.down_proj": ("down_proj",),
}

# What a checkpoint may hold beyond the vocabulary, and why that is not needed.
SKIPS: dict[str, str] = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "rotary frequencies are computed from the configuration",
    r"model\.rotary_emb\.(\w+_)?inv_freq": "rotary frequencies are computed from the configuration",
}
# The same of a model that also takes images, of which text alone is exported.
IMAGE_SKIPS: dict[str, str] = {
    r"(vision|aligner)\..+": "vision tower; text alone is exported",
    r"image_(start|end|newline|pad)": "vision tower; text alone is exported",
    r"layers\.\d+\.ffn\.gate\.bias_vl": "router bias of image tokens; text alone is exported",
}
TIED = "tied to the embedding"
LEFT_OUT = "in a layer left out with --layers"
MTP = "multi-token prediction layer, used for drafting only; --draft exports the first"
MTP_COPY = "a prediction layer's copy of the model's own"
UNTHOUGHT = "reasoning layers, left out with --think-steps 0"
V4_STAGE = "prediction stage (MTP or DSpark), used for drafting only"
V4_MTP = f"{V4_STAGE}; --draft exports the first of MTP"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _shared_width(config: ModelConfig) -> int:
    return config.num_shared_experts * config.moe_intermediate_size


def _index(config: ModelConfig) -> Indexer:
    assert config.indexer is not None
    return config.indexer


def layer_tables(config: ModelConfig, layer: int) -> list[Table]:
    """The tables of one layer, in reading order; names are relative to ``model.layers.{layer}.``."""
    if config.compressed:
        attention = names_v4.attention_tables(config.compressed, layer)
    else:
        attention = [QUERY_LOW_RANK if config.q_lora_rank else QUERY, KEY_VALUE, *([INDEXER] if config.indexer else [])]
    streams = config.hyper is not None
    before, between = (names_v4.ATTENTION_STREAMS, names_v4.FEED_FORWARD_STREAMS) if streams else ({}, {})
    tables = [*_engram_tables(config, layer), before, ATTENTION_NORM, *attention, between, FEED_FORWARD_NORM]
    if not config.is_moe(layer):
        return [*tables, DENSE]
    if layer in config.hash_layers:
        router = [ROUTER, names_v4.HASH_TABLE]
    else:
        router = [ROUTER, ROUTER_BIAS] if config.topk_method == "noaux_tc" else [ROUTER]
    return [*tables, *router, EXPERT, *([SHARED] if config.num_shared_experts else [])]


def _engram_tables(config: ModelConfig, layer: int) -> list[Table]:
    if config.engram is None or not config.has_engram(layer):
        return []
    convolution = [names_engram.CONVOLUTION] if config.engram.kernel else []
    return [names_engram.rows_table(layouts(config.engram)[layer].rows), names_engram.MEMORY, *convolution]


def _fill(config: ModelConfig, table: Table, prefix: str = "") -> list[Expected]:
    kept = {name: value for name, value in table.items() if config.attention_bias or value[1] != "bias"}
    shapes = {name: shape(config) for name, (shape, _) in kept.items()}
    copies = range(config.num_experts) if table is EXPERT else range(1)
    return [
        Expected(prefix + name.replace("{e}", str(e)), shapes[name], role)
        for e in copies
        for name, (_, role) in kept.items()
    ]


def expected(config: ModelConfig) -> dict[str, Expected]:
    """Every tensor the model needs, by canonical name, in reading order."""
    found = _fill(config, EMBEDDING)
    for layer in range(config.num_layers):
        for table in layer_tables(config, layer):
            found += _fill(config, table, f"model.layers.{layer}.")
    if config.hyper and not config.hyper.single_pass:
        found += _fill(config, names_v4.HEAD_STREAMS)
    if config.thinks:
        found += _reasoning(config)
    if config.drafts:
        found += _drafter(config)
    found += _fill(config, FINAL_NORM)
    if not config.tie_word_embeddings:
        found += _fill(config, HEAD)
    return {one.name: one for one in found}


def _reasoning(config: ModelConfig) -> list[Expected]:
    """What reasoning layers need."""
    own, prefix = config.thinker, "model.reasoning."
    found = _fill(config, names_reasoning.VECTORS, prefix)
    for layer in range(own.num_layers):
        for table in layer_tables(own, layer):
            found += _fill(own, table, f"{prefix}layers.{layer}.")
    return found + _fill(config, names_reasoning.TALK_HEAD, prefix)


def _drafter(config: ModelConfig) -> list[Expected]:
    """What the layer needs that drafts."""
    own, streams = config.drafter, {}
    if config.hyper:
        streams = {name.removeprefix("model."): one for name, one in names_v4.HEAD_STREAMS.items()}
    joins = names_draft.APART if config.hyper else names_draft.JOINED
    tables = [names_draft.NORMS, joins, *layer_tables(own, 0), streams, names_draft.FINAL_NORM]
    return [one for table in tables for one in _fill(own, table, drafter_prefix(config))]


def drafter_prefix(config: ModelConfig) -> str:
    """How the names begin of what the layer has that drafts."""
    return f"model.layers.{config.num_layers}."


def fused(config: ModelConfig) -> dict[str, list[list[Expected]]]:
    """Fused tensors that may stand in for experts: name -> per expert, the canonical pieces in stored order."""
    shapes = {name.split(".")[3]: shape(config) for name, (shape, _) in EXPERT.items()}
    return {
        f"model.layers.{layer}.{name}": [
            [
                Expected(f"model.layers.{layer}.mlp.experts.{e}.{projection}.weight", shapes[projection], "expert")
                for projection in projections
            ]
            for e in range(config.num_experts)
        ]
        for layer in (*config.moe_layers, *([config.num_layers] if config.drafts else []))
        for name, projections in FUSED.items()
    }


def skip_reason(name: str, config: ModelConfig) -> str | None:
    """Why a stored tensor is not needed, or None where no reason is known."""
    if config.tie_word_embeddings and name in (HEAD.keys() | {key + SCALE for key in HEAD}):
        return TIED
    if config.reasoning and not config.thinks and name.startswith("model.reasoning."):
        return UNTHOUGHT
    if config.compressed and name.startswith("mtp."):
        may_draft = config.num_mtp_layers and not (config.compressed.shared or re.fullmatch(names_draft.DSPARK, name))
        return V4_MTP if may_draft else V4_STAGE
    if config.drafts and name.removeprefix(drafter_prefix(config)).removesuffix(SCALE) in names_draft.COPIES:
        return MTP_COPY
    layer = _LAYER.match(name)
    if layer and 0 <= int(layer[1]) - config.num_layers < config.left_out_layers:
        return LEFT_OUT
    stage = int(layer[1]) - config.num_layers - config.left_out_layers if layer else -1
    if config.drafts <= stage < config.num_mtp_layers:
        return MTP
    skips = SKIPS | (IMAGE_SKIPS if config.image_token_id is not None else {})
    return next((reason for pattern, reason in skips.items() if re.fullmatch(pattern, name)), None)
