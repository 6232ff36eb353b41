"""The objects inside a config.json: rotary scaling and quantisation, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4export.config import Fp8Blocks, ModelConfig, Yarn
from v4export.config.values import (
    Key,
    check_limited,
    exponent,
    read_fields,
    real,
    refuse_unknown,
    size,
    table,
    wrong_value,
)
from v4export.errors import NotSupported

YARN: dict[str, Key] = {
    "factor": Key("factor", real),
    "original_max_position_embeddings": Key("original_max_position", size),
    "beta_fast": Key("beta_fast", real, 32.0),
    "beta_slow": Key("beta_slow", real, 1.0),
    "mscale": Key("mscale", exponent, 1.0),
    "mscale_all_dim": Key("mscale_all_dim", exponent, 0.0),
}
YARN_LIMITED: dict[str, tuple[Any, ...]] = {
    "truncate": (None, True),
    "attention_factor": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
}

QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": (None, "float", "ue8m0"),
    "expert_dtype": (None, "fp8"),
    "dequantize": (False, True),
}
# Which weights are FP8 is read from their stored dtype, one by one.
QUANTIZATION_IRRELEVANT = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "weight_block_size")


def read_yarn(
    scaling: Mapping[str, Any],
    keys: Mapping[str, Key] = YARN,
    limited: Mapping[str, tuple[Any, ...]] = YARN_LIMITED,
) -> Yarn | None:
    """The rotary scaling of an object without its base, or None where it says there is none."""
    scaling = dict(scaling)
    kinds = {scaling.pop(key) for key in ("type", "rope_type") if isinstance(scaling.get(key), str)}
    kind = kinds.pop() if len(kinds) == 1 else "" if kinds or scaling else "default"
    if kind == "default" and not scaling.keys() - {"original_max_position_embeddings", "factor"}:
        return None
    if kind != "yarn":
        values = f"rope_scaling type = {kind or kinds or None!r}, {scaling}"
        raise NotSupported("this rotary scaling is not supported", values, "Supported: yarn, or none.")
    refuse_unknown(scaling, {*keys, *limited}, "rope_scaling")
    for key, accepted in limited.items():
        check_limited(f"rope_scaling.{key}", scaling.get(key), accepted, NotSupported)
    return Yarn(**read_fields(scaling, keys))


def write_yarn(yarn: Yarn | None, keys: Mapping[str, Key] = YARN) -> dict[str, Any] | None:
    """The Hub's ``rope_scaling``."""
    return {key: getattr(yarn, one.field) for key, one in keys.items()} | {"type": "yarn"} if yarn else None


def read_fp8(raw: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]] = QUANTIZATION) -> Fp8Blocks | None:
    """The FP8 blocks of a config.json's ``quantization_config``; ``values`` has those that are supported by key."""
    quantization = table("quantization_config", raw.get("quantization_config"))
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    fix = "Supported: quant_method fp8 with E4M3 blocks, or no quantization_config."
    check_limited("quantization_config.quant_method", method, values["quant_method"], NotSupported, fix)
    refuse_unknown(quantization, {*values, *QUANTIZATION_IRRELEVANT}, "quantization_config")
    for key, accepted in values.items():
        if key in quantization:
            check_limited(f"quantization_config.{key}", quantization[key], accepted, NotSupported, fix)
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        raise wrong_value("weight_block_size", block, "two integers")
    rows, columns = (size("weight_block_size", one) for one in block)
    return Fp8Blocks(rows, columns, quantization.get("scale_fmt") == "ue8m0")


def write_fp8(config: ModelConfig) -> dict[str, Any]:
    """The Hub's ``quantization_config``, where there is one."""
    if config.fp8 is None:
        return {}
    quantization: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization["weight_block_size"] = [config.fp8.rows, config.fp8.columns]
    quantization |= {"scale_fmt": "ue8m0"} if config.fp8.power_of_two else {}
    return {"quantization_config": quantization}
