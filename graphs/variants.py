"""Kinds of blocks a graph is traced for: a model's own, and what exceptions to a recipe make of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from v4export.checkpoint.names import expected
from v4export.config import ModelConfig
from v4export.model.load import hub_name
from v4export.precision import Format, Precision


@functools.lru_cache(maxsize=8)
def roles(config: ModelConfig) -> dict[str, str]:
    """Hub name -> role of every weight."""
    return {name: one.role for name, one in expected(config).items()}


def formats(config: ModelConfig, precision: Precision, layer: int | None = None) -> Callable[[str], Format]:
    """From the name of a matrix within a block, or within an end of the stack, to its format."""

    def format_of(name: str) -> Format:
        stored = hub_name(name, config, layer)
        assert stored is not None
        return precision.format_of(stored, roles(config)[stored])

    return format_of


def rounding(config: ModelConfig, precision: Precision, layer: int | None = None) -> Callable[[str], bool]:
    """From the name of a matrix within such a part to whether what it multiplies is rounded."""

    def wanted(name: str) -> bool:
        stored = hub_name(name, config, layer)
        assert stored is not None
        return precision.rounds_inputs_of(stored, roles(config)[stored])

    return wanted


def kind_of(config: ModelConfig, precision: Precision, layer: int) -> str:
    """Which kind of block a layer is in a graph: blocks of a kind differ in nothing but the values of their weights."""
    kind = config.kind(layer)
    if not precision.keep:
        return kind
    return " ".join([kind, *(f"{path}:{name}" for path, name in _exceptions(config, precision).get(layer, {}).items())])


@functools.lru_cache(maxsize=8)
def _exceptions(config: ModelConfig, precision: Precision) -> dict[int, dict[str, str]]:
    """By layer, modules within it whose format is not the recipe's own, and its name."""
    found: dict[int, dict[str, str]] = {}
    usual = replace(precision, keep=())
    for name, role in roles(config).items():
        _, _, rest = name.partition("model.layers.")
        layer, _, within = rest.partition(".")
        format = precision.format_of(name, role)
        if rest and format != usual.format_of(name, role):
            path = within.partition(".experts.")[0] + ".experts" if role == "expert" else within
            found.setdefault(int(layer), {})[path.removesuffix(".weight")] = format.name
    return found


def kinds(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """The kinds of block that occur, and the first layer of each."""
    first: dict[str, Any] = {}
    for layer in range(config.num_layers):
        first.setdefault(kind_of(config, precision, layer), layer)
    return first
