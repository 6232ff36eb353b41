"""Reads a Hugging Face config.json into ModelConfig, and writes it back.

The tables are in ``config/keys.py`` and ``config/readers_v4.py``: per family one says how each key is read; another has
the keys that change the maths and are supported at some values only; a third those that change nothing in the exported
function, with the reason. A key in none of the three is an error. Both spellings are taken: the Hub's (``rope_theta`` +
``rope_scaling``, ``torch_dtype``) and that of transformers 5 (``rope_parameters``, ``dtype``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4export.config import CompressedAttention, HyperConnections, Indexer, ModelConfig, Yarn
from v4export.config import readers_v4 as v4
from v4export.config.keys import IRRELEVANT, LIMITED, LIMITED_V32, RULES, V2, V3, V32, Limits
from v4export.config.parts import read_fp8, read_yarn, write_fp8, write_yarn
from v4export.config.values import Key, check_limited, read_fields, real, refuse_unknown, table
from v4export.errors import BadInput, NotSupported


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
    """

    architecture: str
    keys: dict[str, Key]
    limited: Limits
    irrelevant: Mapping[str, str] = field(default_factory=lambda: IRRELEVANT)
    read: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = _read_latent
    write: Callable[[ModelConfig], dict[str, Any]] = _write_latent


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("DeepseekV2ForCausalLM", V2, LIMITED),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", V3, LIMITED),
    "deepseek_v32": Family("DeepseekV32ForCausalLM", V32, LIMITED_V32),
    "deepseek_v4": Family(v4.ARCHITECTURE, v4.KEYS, v4.V4_LIMITED, v4.V4_IRRELEVANT, v4.read, v4.write),
    "kimi_k2": Family("DeepseekV3ForCausalLM", V3, LIMITED),
}
# What a dotted field is a field of.
_NESTED: dict[str, type] = {"indexer": Indexer, "compressed": CompressedAttention, "hyper": HyperConnections}


def _nest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Makes one object of the fields ``indexer.num_heads``, ``indexer.head_dim`` ..., or None where all are None."""
    nested = {name: value for name, value in fields.items() if "." not in name}
    for name, kind in _NESTED.items():
        own = {key.split(".")[1]: value for key, value in fields.items() if key.startswith(f"{name}.")}
        missing = sorted(f"{name}.{key}" for key, value in own.items() if value is None)
        if missing and len(missing) < len(own):
            raise BadInput(f"config values of the {name} are missing", ", ".join(missing))
        nested[name] = kind(**own) if own and not missing else None
    return nested


def _field(config: ModelConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = None if value is None else getattr(value, part)
    return value


def _load(source: Path) -> dict[str, Any]:
    path = source / "config.json" if source.is_dir() else source
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}", str(error), "Give a checkpoint directory with a config.json.") from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are both ValueErrors
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
    raw = source if isinstance(source, Mapping) else _load(Path(source))
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise BadInput(f"unknown model_type {name!r}", f"known: {', '.join(FAMILIES)}", "Check config.json.")
    family = FAMILIES[name]
    also = {key.also for key in family.keys.values()} - {""}
    refuse_unknown(raw, {*family.keys, *also, *family.limited, *family.irrelevant}, "config.json")
    fields = read_fields(raw, family.keys)
    for key, (accepted, error, why) in family.limited.items():
        if key in raw:
            check_limited(key, raw[key], accepted(fields), error, f"Supported: {why}.")
    fields |= family.read(raw, fields)
    config = ModelConfig(family=name, **_nest(fields))
    for holds, wrong, shown in RULES + v4.RULES:
        if not holds(config):
            values = ", ".join(f"{one} = {_field(config, one)!r}" for one in shown)
            raise BadInput(f"config values contradict: {wrong}", values)
    return config


def to_hub_config(config: ModelConfig) -> dict[str, Any]:
    """The Hub-style config.json content that ``read_config`` reads back into an equal ModelConfig."""
    family = FAMILIES[config.family]
    eos = list(config.eos_token_ids)
    raw = {"architectures": [family.architecture], "model_type": config.family, "hidden_act": "silu"}
    raw |= {"eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None} | family.write(config)
    raw |= {name: _field(config, key.field) for name, key in family.keys.items() if name not in raw}
    return dict(sorted(raw.items()))
