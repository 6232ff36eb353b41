"""How every key of a config.json is read: one table per family, and what is limited or irrelevant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from v4export.config import ENTROPY, MARGIN, ModelConfig
from v4export.config.values import (
    Key,
    always,
    count,
    counts,
    exponent,
    integer,
    layer_count,
    layers,
    one_of,
    or_null,
    real,
    size,
    token,
    tokens,
    truth,
)
from v4export.errors import BadInput, NotSupported, V4Error

# key -> (accepted values given the fields read so far, error class, why)
Limits = dict[str, tuple[Callable[[dict[str, Any]], tuple[Any, ...]], type[V4Error], str]]
# (holds, what is wrong, the fields to show)
Rules = tuple[tuple[Callable[[ModelConfig], bool], str, tuple[str, ...]], ...]

COMMON: dict[str, Key] = {
    "vocab_size": Key("vocab_size", size),
    "hidden_size": Key("hidden_size", size),
    "num_hidden_layers": Key("num_layers", layers),
    "num_attention_heads": Key("num_heads", size),
    "q_lora_rank": Key("q_lora_rank", or_null(size)),
    "kv_lora_rank": Key("kv_lora_rank", size),
    "qk_nope_head_dim": Key("qk_nope_head_dim", size),
    "qk_rope_head_dim": Key("qk_rope_head_dim", size),
    "v_head_dim": Key("v_head_dim", size),
    "intermediate_size": Key("intermediate_size", size),
    "first_k_dense_replace": Key("first_k_dense_replace", count),
    "moe_intermediate_size": Key("moe_intermediate_size", size),
    "n_routed_experts": Key("num_experts", size, also="num_local_experts"),
    "n_shared_experts": Key("num_shared_experts", or_null(count, 0)),
    "num_experts_per_tok": Key("experts_per_token", size),
    "n_group": Key("num_groups", or_null(size, 1)),
    "topk_group": Key("topk_groups", or_null(size, 1)),
    "norm_topk_prob": Key("norm_topk_prob", truth),
    "routed_scaling_factor": Key("routed_scaling_factor", real),
    "rms_norm_eps": Key("rms_norm_eps", real),
    "max_position_embeddings": Key("max_position_embeddings", size),
    "tie_word_embeddings": Key("tie_word_embeddings", truth, False),
    "attention_bias": Key("attention_bias", truth, False),
    "num_nextn_predict_layers": Key("num_mtp_layers", layer_count, 0, also="num_mtp_layers"),
    "bos_token_id": Key("bos_token_id", token, None),
    "eos_token_id": Key("eos_token_ids", tokens, None),
    "pad_token_id": Key("pad_token_id", token, None),
    "torch_dtype": Key("dtype", or_null(one_of("bfloat16", "float16", "float32"), "bfloat16"), None, also="dtype"),
}

#: Any family may carry Engram. DeepSeek-V4.1's keys, and those of the paper's form behind them.
ENGRAM: dict[str, Key] = {
    "engram_layer_ids": Key("engram.layers", or_null(counts), None),
    "engram_max_ngram_size": Key("engram.max_order", or_null(integer(2)), None),
    "engram_n_heads": Key("engram.heads", or_null(size), None),
    "engram_head_dim": Key("engram.width", or_null(size), None),
    "engram_vocab_size": Key("engram.buckets", or_null(integer(2)), None),
    "engram_compressed_vocab_size": Key("engram.compressed_vocab", or_null(size), None),
    "engram_pad_token_id": Key("engram.pad_token_id", token, None),
    "engram_seed": Key("engram.seed", count, 0),
    "engram_conv_kernel": Key("engram.kernel", count, 0),
    "engram_conv_dilation": Key("engram.dilation", size, 1),
}
#: Any family may have reasoning layers; what is not given is as in its own layers.
REASONING: dict[str, Key] = {
    "reasoning_num_layers": Key("reasoning.layers", or_null(layers), None),
    "reasoning_num_steps": Key("reasoning.steps", or_null(layer_count), None),
    "reasoning_num_heads": Key("reasoning.num_heads", or_null(size), None),
    "reasoning_q_lora_rank": Key("reasoning.q_lora_rank", or_null(size), None),
    "reasoning_kv_lora_rank": Key("reasoning.kv_lora_rank", or_null(size), None),
    "reasoning_qk_nope_head_dim": Key("reasoning.qk_nope_head_dim", or_null(size), None),
    "reasoning_qk_rope_head_dim": Key("reasoning.qk_rope_head_dim", or_null(size), None),
    "reasoning_v_head_dim": Key("reasoning.v_head_dim", or_null(size), None),
    "reasoning_intermediate_size": Key("reasoning.intermediate_size", or_null(size), None),
    "reasoning_confidence": Key("reasoning.confidence", one_of(ENTROPY, MARGIN), ENTROPY),
    "reasoning_threshold": Key("reasoning.threshold", exponent, 1.0),
}
#: Hyper-connections, where a family may have them or not.
HYPER: dict[str, Key] = {
    "hc_mult": Key("hyper.streams", or_null(size), None),
    "hc_sinkhorn_iters": Key("hyper.sinkhorn_iterations", or_null(size), None),
    "hc_eps": Key("hyper.eps", or_null(real), None),
}

V2 = COMMON | {
    "n_group": Key("num_groups", or_null(size, 1), None),
    "topk_group": Key("topk_groups", or_null(size, 1), None),
    # No released V2 renormalises its router weights, and its implementations disagree on how.
    "norm_topk_prob": Key("norm_topk_prob", always(False), False),
    "scoring_func": Key("scoring", one_of("softmax"), "softmax"),
    "topk_method": Key("topk_method", one_of("greedy", "group_limited_greedy"), "greedy"),
}
# transformers 5 does not write scoring_func and topk_method: its V3 has one way of routing.
V3 = COMMON | {
    "scoring_func": Key("scoring", one_of("sigmoid"), "sigmoid"),
    "topk_method": Key("topk_method", one_of("noaux_tc"), "noaux_tc"),
}
#: The project's own designs: latent attention, with parts of later models.
V4X = V3 | HYPER
V32 = V3 | {
    "index_n_heads": Key("indexer.num_heads", size),
    "index_head_dim": Key("indexer.head_dim", size),
    "index_topk": Key("indexer.top_k", size),
}


def _layer_types(fields: Mapping[str, Any]) -> list[str]:
    dense, layers = fields["first_k_dense_replace"], fields["num_layers"]
    return ["dense" if i < dense else "sparse" for i in range(layers)]


LIMITED: Limits = {
    "hidden_act": (lambda f: ("silu", "swish"), NotSupported, "experts are SwiGLU"),
    "moe_layer_freq": (lambda f: (1,), NotSupported, "every layer after the dense ones has experts"),
    "rope_interleave": (lambda f: (True,), NotSupported, "rotary channels are adjacent pairs"),
    "mlp_bias": (lambda f: (False,), NotSupported, "feed-forward projections have no bias"),
    "use_mla": (lambda f: (True,), NotSupported, "attention is latent attention"),
    "num_key_value_heads": (lambda f: (None, f["num_heads"]), NotSupported, "the latent is expanded to every head"),
    "qk_head_dim": (lambda f: (f["qk_nope_head_dim"] + f["qk_rope_head_dim"],), BadInput, "it is a sum of two keys"),
    "mlp_layer_types": (lambda f: (None, _layer_types(f)), BadInput, "first_k_dense_replace says which are dense"),
    "expert_dtype": (lambda f: (None, "fp8"), NotSupported, "experts are stored like other linear layers"),
    "compression_config": (lambda f: (None,), NotSupported, "compressed-tensors storage is not read"),
}
LIMITED_V32: Limits = LIMITED | {
    "layer_types": (
        lambda f: (None, ["indexed_attention"] * f["num_layers"]),
        NotSupported,
        "every layer's attention has an indexer",
    ),
}

REASONS: dict[str, tuple[str, ...]] = {
    "model_type decides the code": ("architectures", "auto_map", "_name_or_path", "is_encoder_decoder", "problem_type"),
    "says who wrote the file": ("transformers_version",),
    "training only": (
        "attention_dropout", "aux_loss_alpha", "ep_size", "initializer_range", "output_router_logits", "pretraining_tp",
        "router_aux_loss_coef", "seq_aux",
    ),
    "repeats qk_rope_head_dim": ("head_dim",),
    "an option of the Python caller": (
        "_attn_implementation", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
        "torchscript", "use_bfloat16", "use_cache",
    ),
    "classification heads are not part of the model": ("id2label", "label2id"),
    "read on its own": (
        "model_type", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "engram_num_embeddings",
    ),
}  # fmt: skip
IRRELEVANT: dict[str, str] = {key: reason for reason, keys in REASONS.items() for key in keys}

RULES: Rules = (
    (lambda c: c.qk_rope_head_dim % 2 == 0, "rotary channels come in pairs", ("qk_rope_head_dim",)),
    (lambda c: c.num_experts % c.num_groups == 0, "groups must be equally large", ("num_experts", "num_groups")),
    (lambda c: c.topk_groups <= c.num_groups, "more groups are kept than exist", ("topk_groups", "num_groups")),
    (
        lambda c: c.experts_per_token <= c.num_experts // c.num_groups * c.topk_groups or c.topk_method == "greedy",
        "more experts are chosen than the kept groups hold",
        ("experts_per_token", "num_experts", "num_groups", "topk_groups"),
    ),
    (
        lambda c: c.experts_per_token <= c.num_experts,
        "more experts are chosen than exist",
        ("experts_per_token", "num_experts"),
    ),
    (
        lambda c: c.topk_method != "noaux_tc" or c.num_groups == 1 or c.num_experts // c.num_groups >= 2,
        "a group's score is the sum of its two best experts",
        ("num_experts", "num_groups"),
    ),
    (
        lambda c: c.indexer is None or c.qk_rope_head_dim <= c.indexer.head_dim,
        "more channels are rotated than an indexer's head has",
        ("qk_rope_head_dim", "indexer.head_dim"),
    ),
)  # fmt: skip
