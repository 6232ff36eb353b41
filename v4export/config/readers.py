"""Reads a Hugging Face config.json into ModelConfig, and writes it back.

The tables are in ``config/keys.py`` and ``config/readers_v4.py``: per family one says how each key is read; another has
the keys that change the maths and are supported at some values only; a third those that change nothing in the exported
function, with the reason. A key in none of the three is an error. Both spellings are taken: the Hub's (``rope_theta`` +
``rope_scaling``, ``torch_dtype``) and that of transformers 5 (``rope_parameters``, ``dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from v4export.config import CompressedAttention, Engram, HyperConnections, Indexer, ModelConfig, Reasoning, Yarn
from v4export.config import readers_v4 as v4
from v4export.config import readers_v41 as v41
from v4export.config.hashes import layouts
from v4export.config.keys import ENGRAM, IRRELEVANT, LIMITED, LIMITED_V32, REASONING, RULES, V2, V3, V4X, V32, Limits
from v4export.config.parts import read_fp8, read_yarn, write_fp8, write_yarn
from v4export.config.values import Key, check_limited, read_fields, real, refuse_unknown, table
from v4export.errors import BadInput, NotSupported
from v4export.side_files import file_of, json_value, read


def _read_latent(raw: Mapping[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    dense = min(fields.pop("first_k_dense_replace"), fields["num_layers"])
    theta, yarn = _rope(raw)
    moe_layers = tuple(range(dense, fields["num_layers"]))
    return {"moe_layers": moe_layers, "rope_theta": theta, "yarn": yarn, "fp8": read_fp8(raw)}


def _rope(raw: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    scaling = dict(table("rope_scaling", raw.get("rope_scaling")) or {})
    scaling |= table("rope_parameters", raw.get("rope_parameters")) or {}
    thetas = [real("rope_theta", one["rope_theta"]) for one in (raw, scaling) if one.get("rope_theta") is not None]
    if len(set(thetas)) != 1:
        values = f"rope_theta = {thetas or 'missing'}"
        raise BadInput("config key rope_theta is missing or given twice with different values", values)
    scaling.pop("rope_theta", None)
    return thetas[0], read_yarn(scaling)


def _write_latent(config: ModelConfig) -> dict[str, Any]:
    dense = config.num_layers - len(config.moe_layers)
    if config.moe_layers != tuple(range(dense, config.num_layers)):
        raise NotSupported("expert layers must be the last ones to be written", f"moe_layers = {config.moe_layers}")
    raw: dict[str, Any] = {"first_k_dense_replace": dense, "moe_layer_freq": 1}
    raw |= {"num_key_value_heads": config.num_heads, "rope_theta": config.rope_theta}
    return raw | {"rope_scaling": write_yarn(config.yarn)} | write_fp8(config)


@dataclass(frozen=True)
class Family:
    """How a model_type is read and written.

    Attributes:
        architecture: name of its class.
        keys: how each key is read.
        limited: keys that are supported at some values only.
        irrelevant: keys that change nothing, or are read by ``read``, and why.
        read: from the content and the fields of ``keys``, the fields that no key gives by itself.
        write: the keys that ``read`` reads.
        flatten: from the content of a file to keys that do not nest.
        nest: the reverse.
    """

    architecture: str
    keys: dict[str, Key]
    limited: Limits
    irrelevant: Mapping[str, str] = field(default_factory=lambda: IRRELEVANT)
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _read_latent
    write: Callable[[ModelConfig], dict[str, Any]] = _write_latent
    flatten: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda raw: raw
    nest: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: raw

    @property
    def all_keys(self) -> dict[str, Key]:
        """Its own keys, and those that any family may have."""
        return self.keys | ENGRAM | REASONING


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", V2, LIMITED),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", V3, LIMITED),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", V32, LIMITED_V32),
    "deepseek_v4": Family(v4.ARCHITECTURE, v4.KEYS, v4.V4_LIMITED, v4.V4_IRRELEVANT, v4.read, v4.write),
    "deepseek_v41": Family(
        v41.ARCHITECTURE, v41.KEYS, v41.LIMITED, v41.IRRELEVANT, v41.read, v41.write, v41.flatten, v41.nest
    ),
    "kimi_k2": Family("DeepseekV3ForCausalLM", V3, LIMITED),
    "v4x": Family("V4xForCausalLM", V4X, LIMITED),
}
#: Of a config.json.
_MOST_BYTES = 10_000_000
#: Of Engram, each with a prime number of its own to be found.
_MOST_HASHES = 4096
# What a dotted field is a field of.
_NESTED: dict[str, type] = {
    "indexer": Indexer,
    "compressed": CompressedAttention,
    "hyper": HyperConnections,
    "engram": Engram,
    "reasoning": Reasoning,
}


def _nest(given: Mapping[str, Any]) -> dict[str, Any]:
    """Makes one object of the fields ``indexer.num_heads``, ``indexer.head_dim`` ..., or None where none is there."""
    nested = {name: value for name, value in given.items() if "." not in name}
    for name, kind in _NESTED.items():
        own = {key.split(".")[1]: value for key, value in given.items() if key.startswith(f"{name}.")}
        defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        missing = sorted(f"{name}.{key}" for key, value in own.items() if value is None and key not in defaults)
        there = [key for key, value in own.items() if value not in (None, defaults.get(key))]
        if missing and there:
            raise BadInput(f"config values of the {name} are missing", ", ".join(missing))
        nested[name] = kind(**own) if own and not missing else None
    return nested


def _field(config: ModelConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def table_rows(engram: Engram) -> list[int]:
    """Rows of each layer's table."""
    return [layout.rows for layout in layouts(engram).values()]


def _check_engram(engram: Engram, config: ModelConfig) -> None:
    """Raises BadInput for values that do not go together."""
    faults = {
        "layers in order are wanted": list(engram.layers) != sorted(set(engram.layers)),
        f"there are {config.num_layers} layers": engram.layers[-1] >= config.num_layers,
        "the pad token is not in the vocabulary": engram.pad_token_id >= config.vocab_size,
        "a convolution has two taps at least": engram.kernel == 1,
        f"all layers have at most {_MOST_HASHES} hashes": engram.hashes * len(engram.layers) > _MOST_HASHES,
    }
    if any(faults.values()):
        wrong = ", ".join(what for what, is_so in faults.items() if is_so)
        raise BadInput(f"config values of Engram contradict: {wrong}", str(engram))


def _check_reasoning(config: ModelConfig) -> None:
    """Raises BadInput where the sizes of reasoning layers are neither given nor the model's own."""
    own = config.thinker
    needed = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size")
    missing = [f"reasoning_{name}" for name in needed if not getattr(own, name)]
    if missing:
        raise BadInput(
            "sizes of the reasoning layers are missing",
            f"{', '.join(missing)}; the model's own attention is not latent, so it has none that they could share",
            "Give them in config.json.",
        )
    if own.qk_rope_head_dim % 2:
        raise BadInput("rotary channels come in pairs", f"reasoning_qk_rope_head_dim = {own.qk_rope_head_dim}")


def check_rows(engram: Engram, said: Any) -> None:
    """Raises BadInput where the sizes of tables that a file states are not those that its hashes have."""
    rows = table_rows(engram)
    if said is not None and said != rows:
        raise BadInput(
            "config key engram_num_embeddings is not the number of rows of the Engram tables",
            f"it says {said!r}; the primes from engram_vocab_size = {engram.buckets} on add up to {rows}",
            "Use the model's published config.json.",
        )


def load_config(source: Path) -> dict[str, Any]:
    """The content of a config.json, given its path or its directory.

    Raises:
        BadInput: there is none, it leads out of its directory, is too large, or is no JSON object.
    """
    path = source
    if source.is_dir():
        path = file_of(source, "config.json") or source / "config.json"
    try:
        return parse_config(path, read(path, _MOST_BYTES))
    except OSError as error:
        raise BadInput(f"cannot read {path}", str(error), "Give a checkpoint directory with a config.json.") from error


def parse_config(path: Path, data: bytes) -> dict[str, Any]:
    """The same of bytes that were read from ``path``."""
    try:
        raw = json_value(data)
    except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
        raise BadInput(f"{path} is not JSON", str(error)) from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} is not a model configuration", f"it holds {type(raw).__name__}, not an object")
    return raw


def read_config(source: str | Path | Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json: its path, its directory, or its parsed content.

    Raises:
        BadInput: unknown model_type or key, a missing key, a value of the wrong type, values that contradict.
        NotSupported: a value that is valid and has no implementation here.
    """
    raw = source if isinstance(source, Mapping) else load_config(Path(source))
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(f"unknown model_type {name!r}", f"known: {', '.join(FAMILIES)}", "Check config.json.")
    family = FAMILIES[name]
    raw = family.flatten(raw)
    keys = family.all_keys
    also = {key.also for key in keys.values()} - {""}
    refuse_unknown(raw, {*keys, *also, *family.limited, *family.irrelevant}, "config.json")
    given = read_fields(raw, keys)
    for key, (accepted, error, why) in family.limited.items():
        if key in raw:
            check_limited(key, raw[key], accepted(given), error, f"Supported: {why}.")
    given |= family.read(raw, given)
    nested = _nest(given)
    if nested["engram"] and not nested["engram"].layers:
        nested["engram"] = None
    config = ModelConfig(family=name, **nested)
    for holds, wrong, shown in RULES + v4.RULES + v41.RULES:
        if not holds(config):
            values = ", ".join(f"{one} = {_field(config, one)!r}" for one in shown)
            raise BadInput(f"config values contradict: {wrong}", values)
    if config.engram:
        _check_engram(config.engram, config)
        check_rows(config.engram, raw.get("engram_num_embeddings"))
    if config.reasoning:
        _check_reasoning(config)
    return config


def to_hub_config(config: ModelConfig) -> dict[str, Any]:
    """The Hub-style config.json content that ``read_config`` reads back into an equal ModelConfig."""
    family = FAMILIES[config.family]
    eos = list(config.eos_token_ids)
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.family, "hidden_act": "silu"}
    raw |= {"eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None} | family.write(config)
    raw |= {
        name: list(value) if isinstance(value := _field(config, key.field), tuple) else value
        for name, key in family.all_keys.items()
        if name not in raw and not _is_absent(config, key.field)
    }
    if config.engram:
        raw["engram_num_embeddings"] = table_rows(config.engram)
    return family.nest(dict(sorted(raw.items())))


def _is_absent(config: ModelConfig, name: str) -> bool:
    """Whether a dotted field is one of something that the model does not have, or is not given."""
    return "." in name and _field(config, name) is None
