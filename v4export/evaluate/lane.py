"""A lane: one recipe on its way through the model, a layer at a time, with all windows of a text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.graphs.variants import formats
from v4export.model.block import STATE, Block, Embed, Head, block_shares
from v4export.model.inputs import set_input_scales
from v4export.model.linear import activations_of, hold
from v4export.model.load import Lookup, fill, hub_name
from v4export.model.transformer import empty_state
from v4export.precision import Format, Precision
from v4export.verify.looked_up import EngramReference
from v4export.verify.rounded import rounded

#: What blocks read and hand on, by name.
Shared = dict[str, torch.Tensor]

_Part = TypeVar("_Part", bound=nn.Module)


@dataclass(frozen=True)
class Lane:
    """How a recipe computes the parts of a model; it holds none of them.

    Attributes:
        name: of the recipe.
        precision: the recipe.
        config: the model, with what the recipe changes of it.
        weights: of the audited checkpoint.
        token_map: token id -> compressed id, where there is Engram.
        scales: by which inputs are rounded to FP8, by Hub name, for a recipe that does.
    """

    name: str
    precision: Precision
    config: ModelConfig
    weights: Mapping[str, Weight] = field(repr=False)
    token_map: np.ndarray | None = field(default=None, repr=False)
    scales: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return activations_of(self.precision)

    @property
    def head_key(self) -> tuple[torch.dtype, Format, bool]:
        """Lanes of a model with equal ones have the same head."""
        return self.dtype, formats(self.config, self.precision)("lm_head.weight"), "lm_head.input_scale" in self.scales

    def embedding(self, values: Lookup) -> Embed:
        """The embedding; here and below, ``values`` are the checkpoint's own."""
        return self._filled(Embed(self.config, self.dtype), values)

    def block(self, layer: int, values: Lookup) -> Block:
        """A layer."""
        return self._filled(Block(self.config, layer, self.dtype), values, layer)

    def head(self, values: Lookup) -> Head:
        """The head."""
        return self._filled(Head(self.config, self.dtype), values)

    def step(self, block: Block, layer: int, ids_BS: np.ndarray, given: Shared) -> Shared:
        """All tokens of some windows through a layer at once: what the next one reads."""
        state = empty_state(self.config, layer, self.dtype, len(ids_BS))
        looked_up = {"engram": self._looked_up(layer, ids_BS)} if self.config.has_engram(layer) else {}
        out = block(given["hidden"], given | looked_up, state)
        named = out.named() | {STATE + name: value for name, value in state.items()}
        return given | {name: named[own] for name, own in block_shares(self.config, layer).items()}

    def _looked_up(self, layer: int, ids_BS: np.ndarray) -> torch.Tensor:
        """[B, S, W]; int64 numbers of rows where tables are inside the graph."""
        none = np.empty(0, np.int64)
        found = torch.from_numpy(np.stack([self._engram.rows(layer, none, ids) for ids in ids_BS]))
        return found.to(self.dtype) if found.is_floating_point() else found

    @functools.cached_property
    def _engram(self) -> EngramReference:
        assert self.token_map is not None
        return EngramReference(self.config, dict(self.weights), self.precision, self.token_map)

    def _filled(self, part: _Part, values: Lookup, layer: int | None = None) -> _Part:
        """A part with its weights; those that the recipe stores narrow are widened once, and not at every step."""
        format_of = formats(self.config, self.precision, layer)

        def wide(name: str) -> Format:
            found = format_of(name)
            return self.precision.plain if found.scaled else found

        def held(name: str) -> torch.Tensor:
            return torch.from_numpy(rounded(values(name).numpy(), self.weights[name], self.precision))

        hold(part, wide)
        fill(part, self.config, held, layer)
        set_input_scales(part, self.scales, layer, self.config)
        return part


def values_of(part: nn.Module, config: ModelConfig, layer: int | None = None) -> Lookup:
    """The checkpoint's own values, as a part of the float32 reference holds them: they are read once for all."""
    by_name = {hub_name(name, config, layer): value.data for name, value in part.named_parameters()}
    return lambda name: by_name[name]


def in_types_of(mine: Shared, given: Shared) -> Shared:
    """What the reference hands to a layer, in a lane's types.

    Rows that the lane keeps in another form, narrow ones with multipliers, are its own.
    """
    same = {name for name, value in mine.items() if name in given and value.dtype.itemsize > 1}
    return mine | {name: given[name].to(mine[name].dtype) for name in same}
