"""DeepSeek-V4.1's config.json, whose text model is an object inside the file.

Values may stand in the file or in its ``text_config``. Layers share entries: which layer makes them, which selects and
which only reads is said by three lists of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4export.config import FULL, REINDEX, REUSE, WINDOW, ModelConfig, SharedEntries
from v4export.config import readers_v4 as v4
from v4export.config.keys import Limits, Rules
from v4export.config.parts import read_fp8, write_fp8, write_yarn
from v4export.config.values import Key, count, counts, or_null, real, size, table, token, wrong_value
from v4export.errors import BadInput, NotSupported

ARCHITECTURE = "DeepseekV41ForCausalLM"
_TEXT = "deepseek_v41_text"
KEYS: dict[str, Key] = v4.KEYS | {
    "index_n_heads": Key("indexer.num_heads", size),
    "index_head_dim": Key("indexer.head_dim", size),
    "index_topk": Key("indexer.top_k", size),
    "qk_rope_head_dim": Key("qk_rope_head_dim", size),
    "rope_theta": Key("rope_theta", real),
    "compress_rope_theta": Key("compressed.rope_theta", real),
    "image_token_id": Key("image_token_id", or_null(token), None),
}
LIMITED: Limits = {key: limit for key, limit in v4.V4_LIMITED.items() if key != "vision_config"} | {
    "topk_group": (lambda f: (None, 1), NotSupported, "experts are not grouped"),
    "n_group": (lambda f: (None, 1), NotSupported, "experts are not grouped"),
}
_SOURCES = ("kv_source_layer_ids", "index_source_layer_ids")
_CANDIDATES = ("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size")
# V4's that V4.1 reads by themselves, or does not have
_OTHERS = (
    "qk_rope_head_dim", "compress_rope_theta", "rope_theta", "layer_types", "compress_rates", "num_hash_layers",
    "mlp_layer_types", "partial_rotary_factor",
)  # fmt: skip
IRRELEVANT: dict[str, str] = {
    key: reason
    for key, reason in v4.V4_IRRELEVANT.items()
    if key not in _OTHERS
} | dict.fromkeys((*_SOURCES, *_CANDIDATES), "read with another key") | {
    "vision_config": "text alone; the audit lists the vision tower's tensors as skipped",
    "dspark_n_routed_experts": "drafting only",
    "dspark_num_experts_per_tok": "drafting only",
}  # fmt: skip

RULES: Rules = (
    (
        lambda c: not _shared(c) or set(_shared(c).kv_sources) <= set(_shared(c).index_sources),
        "a layer that makes entries also selects among them",
        ("compressed.shared",),
    ),
    (
        lambda c: not _shared(c) or (_shared(c).candidate_source or 0) < c.num_layers,
        "the source of candidates is no layer",
        ("compressed.shared",),
    ),
    (
        lambda c: (
            not _shared(c)
            or _shared(c).candidate_source is None
            or (
                _shared(c).candidate_source in _shared(c).index_sources
                and _shared(c).candidate_source >= _shared(c).decoder
                and min(_shared(c).candidate_blocks, _shared(c).candidate_block_size) > 0
            )
        ),
        "candidates are blocks of the last entries made, kept by a layer that selects",
        ("compressed.shared",),
    ),
)


def _shared(config: ModelConfig) -> Any:
    return config.compressed and config.compressed.shared


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The file's own keys and those of its ``text_config`` beside each other.

    Raises:
        BadInput: a key is in both with different values, or the text model is another.
    """
    text = dict(table("text_config", raw.get("text_config")) or {})
    kind = text.pop("model_type", _TEXT)
    if kind != _TEXT:
        raise wrong_value("text_config.model_type", kind, f"{_TEXT!r}")
    outer = {key: value for key, value in raw.items() if key != "text_config"}
    differ = sorted(key for key in text.keys() & outer.keys() if text[key] != outer[key])
    if differ:
        values = "; ".join(f"{key} = {outer[key]!r} and {text[key]!r}" for key in differ)
        raise BadInput(f"config keys differ between config.json and its text_config: {', '.join(differ)}", values)
    return outer | text


_OUTER = ("architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "image_token_id",
          "torch_dtype", "quantization_config")  # fmt: skip


def nest(raw: dict[str, Any]) -> dict[str, Any]:
    """The reverse of ``flatten``."""
    outer = {key: raw[key] for key in _OUTER if key in raw}
    return outer | {"text_config": {"model_type": _TEXT} | {k: v for k, v in raw.items() if k not in outer}}


def read(raw: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields that no key gives by itself.

    Raises:
        BadInput: a key is missing or wrong, or two disagree.
        NotSupported: a schedule of layers, or a rotary scaling, that has no implementation.
    """
    layers = given["num_layers"]
    kv, index = (_layers(raw, key, layers) for key in _SOURCES)
    ratios = _ratios(raw, layers, kv)
    source = raw.get("candidate_source_layer_id")
    source = None if source in (None, -1) else count("candidate_source_layer_id", source)
    blocks, block_size = (count(key, raw.get(key, 0) or 0) for key in _CANDIDATES[1:])
    quantized = table("quantization_config", raw.get("quantization_config"))
    # The releases leave ``fmt`` out.
    stored = dict(raw) | {"quantization_config": quantized and {"fmt": "e4m3"} | quantized}
    kinds = tuple(
        WINDOW if not ratio else FULL if i in kv else REINDEX if i in index else REUSE for i, ratio in enumerate(ratios)
    )
    shared = SharedEntries(kv, index, source, blocks, block_size) if kv else None
    return {
        "kv_lora_rank": 0,
        "qk_nope_head_dim": 0,
        "v_head_dim": 0,
        "intermediate_size": 0,
        "moe_layers": tuple(range(layers)),
        "num_groups": 1,
        "topk_groups": 1,
        "yarn": v4.yarn("rope_scaling", raw.get("rope_scaling")),
        "fp8": read_fp8(stored, v4.QUANTIZATION_V4),
        "fp4_experts": "fp4" in (raw.get("expert_dtype"), (quantized or {}).get("expert_dtype")),
        "hyper.single_pass": True,
        "compressed.layers": kinds,
        "compressed.ratios": ratios,
        "compressed.norm_queries": False,
        "compressed.shared": shared,
    }


def _layers(raw: Mapping[str, Any], key: str, layers: int) -> tuple[int, ...]:
    found = counts(key, raw.get(key))
    if list(found) != sorted(set(found)) or (found and found[-1] >= layers):
        raise wrong_value(key, list(found), f"layers in order, each below {layers}")
    return found


def _ratios(raw: Mapping[str, Any], layers: int, kv: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens of an entry, layer by layer; entries after the layers are those of prediction stages."""
    ratios = counts("compress_ratios", raw.get("compress_ratios"))
    if len(ratios) < layers or any(ratios[layers:]):
        raise wrong_value("compress_ratios", list(ratios), f"{layers} numbers, and zeros for prediction stages")
    for i, ratio in enumerate(ratios[:layers]):
        sources = [source for source in kv if source <= i]
        wanted = ratios[sources[-1]] if sources else 0
        if ratio != wanted or (i in kv and not ratio):
            raise NotSupported(
                "a layer does not read the entries of the last layer that makes some",
                f"compress_ratios[{i}] = {ratio}, kv_source_layer_ids = {list(kv)}",
            )
    return ratios[:layers]


def write(config: ModelConfig) -> dict[str, Any]:
    """The keys that ``read`` reads."""
    c = config.compressed
    assert c is not None
    raw: dict[str, Any] = {
        "num_key_value_heads": 1,
        "rope_scaling": write_yarn(config.yarn, v4.YARN_V4),
        "compress_ratios": [*c.ratios, *[0] * config.num_mtp_layers],
        **{key: [] for key in _SOURCES},
    }
    if c.shared:
        s = c.shared
        candidates = (
            -1 if s.candidate_source is None else s.candidate_source,
            s.candidate_blocks,
            s.candidate_block_size,
        )
        raw |= dict(zip(_SOURCES, (list(s.kv_sources), list(s.index_sources)), strict=True))
        raw |= dict(zip(_CANDIDATES, candidates, strict=True))
    quantized = write_fp8(config)
    if config.fp4_experts and quantized:
        quantized["quantization_config"]["expert_dtype"] = "fp4"
    return raw | quantized
