"""DeepSeek-V4's config.json, as DeepSeek writes it and as transformers does.

The two say the same in different words: ``compress_ratios``, ``num_hash_layers``, ``qk_rope_head_dim`` and flat rotary
keys, or ``layer_types`` + ``compress_rates``, ``mlp_layer_types``, ``partial_rotary_factor`` and nested
``rope_parameters``. A file may use either for each of them; where it uses both they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from v4export.config import CSA, HCA, WINDOW, ModelConfig
from v4export.config.keys import COMMON, LIMITED, REASONS, Limits, Rules
from v4export.config.parts import QUANTIZATION, YARN, YARN_LIMITED, read_fp8, read_yarn, write_fp8, write_yarn
from v4export.config.values import (
    Key,
    agreed,
    always,
    count,
    layer_count,
    layers,
    one_of,
    or_null,
    real,
    size,
    table,
    wrong_value,
)
from v4export.errors import BadInput, NotSupported

ARCHITECTURE = "DeepseekV4ForCausalLM"
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "moe_intermediate_size",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "routed_scaling_factor", "rms_norm_eps",
    "max_position_embeddings", "tie_word_embeddings", "num_nextn_predict_layers", "bos_token_id", "eos_token_id",
    "pad_token_id", "torch_dtype",
)  # fmt: skip
KEYS: dict[str, Key] = {key: COMMON[key] for key in _SHARED} | {
    "q_lora_rank": Key("q_lora_rank", size),
    "norm_topk_prob": Key("norm_topk_prob", always(True), True),
    "scoring_func": Key("scoring", one_of("sqrtsoftplus"), "sqrtsoftplus"),
    "topk_method": Key("topk_method", one_of("noaux_tc"), "noaux_tc"),
    "attention_bias": Key("attention_bias", always(False), False),
    "swiglu_limit": Key("swiglu_limit", real),
    "head_dim": Key("compressed.head_dim", size),
    "sliding_window": Key("compressed.window", size),
    "o_groups": Key("compressed.o_groups", size),
    "o_lora_rank": Key("compressed.o_lora_rank", size),
    "hc_mult": Key("hyper.streams", size),
    "hc_sinkhorn_iters": Key("hyper.sinkhorn_iterations", layers),
    "hc_eps": Key("hyper.eps", real),
    # A model without compressed sparse attention needs none of the three.
    "index_n_heads": Key("indexer.num_heads", or_null(size), None),
    "index_head_dim": Key("indexer.head_dim", or_null(size), None),
    "index_topk": Key("indexer.top_k", or_null(size), None),
}
V4_LIMITED: Limits = {key: LIMITED[key] for key in ("hidden_act", "mlp_bias", "compression_config")} | {
    "num_key_value_heads": (lambda f: (None, 1), NotSupported, "every head has the same key, which is also the value"),
    "vision_config": (lambda f: (None,), NotSupported, "text alone; a vision tower is not exported"),
}
_REASONS = {reason: keys for reason, keys in REASONS.items() if "head_dim" not in keys} | {
    "training only, of V4": ("router_jitter_noise",),
    "drafting only": (
        "dspark_block_size", "dspark_noise_token_id", "dspark_markov_rank", "dspark_target_layer_ids",
    ),
    "read with another key": (
        "compress_ratios", "layer_types", "compress_rates", "num_hash_layers", "mlp_layer_types", "qk_rope_head_dim",
        "partial_rotary_factor", "compress_rope_theta", "expert_dtype",
    ),
}  # fmt: skip
V4_IRRELEVANT: dict[str, str] = {key: reason for reason, keys in _REASONS.items() for key in keys}

RULES: Rules = (
    (
        lambda c: not c.compressed or c.num_heads % c.compressed.o_groups == 0,
        "groups of heads must be equally large",
        ("num_heads", "compressed.o_groups"),
    ),
    (
        lambda c: not c.compressed or c.qk_rope_head_dim <= c.compressed.head_dim,
        "more channels are rotated than a head has",
        ("qk_rope_head_dim", "compressed.head_dim"),
    ),
    (
        lambda c: not c.compressed or CSA not in c.compressed.layers or c.indexer is not None,
        "compressed sparse attention needs an indexer: index_n_heads, index_head_dim, index_topk",
        ("indexer",),
    ),
    (
        lambda c: all(layer < c.num_layers for layer in c.hash_layers),
        "more layers choose experts by token than exist",
        ("num_layers", "hash_layers"),
    ),
    (
        lambda c: not c.fp4_experts or (c.hidden_size % 32 == 0 and c.moe_intermediate_size % 32 == 0),
        "FP4 experts share a multiplier per 32 numbers",
        ("hidden_size", "moe_intermediate_size"),
    ),
)

_BY_RATIO = {0: WINDOW, 4: CSA, 128: HCA}
_BY_NAME = {
    "sliding_attention": WINDOW,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
_RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
# Neither cos and sin nor the softmax scale are stretched in V4, whatever the factor: mscale is no key, and 0 here.
YARN_V4 = {key: one for key, one in YARN.items() if "mscale" not in key}
YARN_LIMITED_V4 = {"truncate": YARN_LIMITED["truncate"], "attention_factor": (None, 1, 1.0)}
QUANTIZATION_V4 = QUANTIZATION | {"expert_dtype": (None, "fp8", "fp4")}


def read(raw: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that no key gives by itself.

    Raises:
        BadInput: a key is missing or wrong, or two disagree.
        NotSupported: a compression ratio or a rotary scaling that has no implementation.
    """
    layers = fields["num_layers"]
    flat = dict(raw) | _nested_rope(raw)
    width = fields["compressed.head_dim"]

    def rotated(key: str, value: Any) -> int:
        return round(width * real(key, value))

    kinds = agreed(raw, {"compress_ratios": _kinds_by_ratio(layers), "layer_types": _kinds_by_name(layers)})
    rates = agreed(raw, {"compress_ratios": lambda key, value: (4, 128), "compress_rates": _rates})
    hashed = {
        "num_hash_layers": lambda key, value: tuple(range(layer_count(key, value))),
        "mlp_layer_types": _hashed(layers),
    }
    branches = ("", "rope_parameters.main.", "rope_parameters.compress.")
    rope = {"qk_rope_head_dim": size} | {f"{branch}partial_rotary_factor": rotated for branch in branches}
    quantized = table("quantization_config", raw.get("quantization_config")) or {}
    stored = dict(raw) | {f"quantization_config.{key}": value for key, value in quantized.items()}
    dtypes = dict.fromkeys(("expert_dtype", "quantization_config.expert_dtype"), one_of("fp4", "fp8"))
    scaling = agreed(flat, {"rope_scaling": yarn, "rope_parameters.compress": yarn}, None)
    if read_yarn(_without_base(flat.get("rope_parameters.main") or {})) is not None:
        raise NotSupported(
            "window layers have no rotary scaling", f"rope_parameters.main = {flat['rope_parameters.main']}"
        )
    return {
        "kv_lora_rank": 0,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": agreed(flat, rope),
        "v_head_dim": 0,
        "intermediate_size": 0,
        "moe_layers": tuple(range(layers)),
        "num_groups": 1,
        "topk_groups": 1,
        "rope_theta": agreed(flat, {"rope_theta": real, "rope_parameters.main.rope_theta": real}),
        "yarn": scaling,
        "fp8": read_fp8(raw, QUANTIZATION_V4),
        "fp4_experts": agreed(stored, dtypes, "fp8") == "fp4",
        "hash_layers": agreed(raw, hashed),
        "compressed.layers": kinds,
        "compressed.ratios": tuple({WINDOW: 0, CSA: rates[0], HCA: rates[1]}[kind] for kind in kinds),
        "compressed.rope_theta": agreed(
            flat, {"compress_rope_theta": real, "rope_parameters.compress.rope_theta": real}
        ),
    }


def _nested_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' ``rope_parameters``, each of its values under a dotted key."""
    parameters = table("rope_parameters", raw.get("rope_parameters")) or {}
    if parameters.keys() - {"main", "compress"}:
        raise wrong_value("rope_parameters", parameters, "the objects main and compress")
    flat: dict[str, Any] = {}
    for branch, content in parameters.items():
        key = f"rope_parameters.{branch}"
        flat |= {key: content} | {f"{key}.{name}": value for name, value in (table(key, content) or {}).items()}
    return flat


def _without_base(scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scaling.items() if key not in ("rope_theta", "partial_rotary_factor")}


def yarn(key: str, value: Any) -> Any:
    """Reads a rotary scaling that stretches neither cos and sin nor the softmax scale."""
    found = read_yarn(_without_base(table(key, value) or {}), YARN_V4, YARN_LIMITED_V4)
    return found and replace(found, mscale=0.0)


def _list(key: str, value: Any, least: int) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise wrong_value(key, value, f"a list of {least} entries, one a layer")
    return value


def _kinds_by_ratio(layers: int) -> Any:
    def read(key: str, value: Any) -> tuple[str, ...]:
        ratios = [count(key, one) for one in _list(key, value, layers)]
        if any(ratios[layers:]):
            # The entries after the layers are those of prediction stages, and their number differs between releases.
            raise BadInput(f"config key {key} has entries that belong to no layer", f"{ratios[layers:]} after {layers}")
        unknown = sorted({*ratios} - _BY_RATIO.keys())
        if unknown:
            values = f"{key} has {', '.join(map(str, unknown))}"
            raise NotSupported("a compression ratio is not supported", values, "Supported: 0, 4 and 128.")
        return tuple(_BY_RATIO[ratio] for ratio in ratios[:layers])

    return read


def _words(key: str, value: Any, layers: int, known: Mapping[str, Any]) -> list[str]:
    words = _list(key, value, layers)
    if len(words) != layers or not all(isinstance(word, str) and word in known for word in words):
        raise wrong_value(key, value, f"{layers} of {', '.join(known)}")
    return words


def _kinds_by_name(layers: int) -> Any:
    return lambda key, value: tuple(_BY_NAME[word] for word in _words(key, value, layers, _BY_NAME))


def _hashed(layers: int) -> Any:
    known = {"hash_moe": True, "moe": False}
    return lambda key, value: tuple(i for i, word in enumerate(_words(key, value, layers, known)) if known[word])


def _rates(key: str, value: Any) -> tuple[int, int]:
    rates = table(key, value) or {}
    if rates.keys() - _RATES.keys():
        raise wrong_value(key, value, f"entries {' and '.join(_RATES)}")
    csa, hca = (size(f"{key}.{name}", rates.get(name, usual)) for name, usual in _RATES.items())
    return csa, hca


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys that ``read`` reads, in DeepSeek's spelling wherever that can say it."""
    c = config.compressed
    assert c is not None
    raw: dict[str, Any] = {
        "num_key_value_heads": 1,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": c.rope_theta,
        "rope_scaling": write_yarn(config.yarn, YARN_V4),
    }
    rates = {kind: ratio for kind, ratio in zip(c.layers, c.ratios, strict=True) if ratio}
    rates = {word: rates.get(_BY_NAME[word], usual) for word, usual in _RATES.items()}
    if rates == _RATES:
        ratios = {kind: ratio for ratio, kind in _BY_RATIO.items()}
        raw["compress_ratios"] = [ratios[kind] for kind in c.layers] + [0] * config.num_mtp_layers
    else:
        words = {kind: word for word, kind in _BY_NAME.items()}
        raw["layer_types"] = [words[kind] for kind in c.layers]
        raw["compress_rates"] = rates
    if config.hash_layers == tuple(range(len(config.hash_layers))):
        raw["num_hash_layers"] = len(config.hash_layers)
    else:
        hashed = set(config.hash_layers)
        raw["mlp_layer_types"] = ["hash_moe" if i in hashed else "moe" for i in range(config.num_layers)]
    return raw | write_fp8(config) | ({"expert_dtype": "fp4"} if config.fp4_experts else {})
