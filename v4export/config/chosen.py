"""What a user changes of a model before it is exported. A bundle's manifest records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from v4export.config import ModelConfig
from v4export.errors import BadInput, NotSupported

#: What is wrong with drafters of the releases after DeepSeek-V4's first.
DSPARK = "this model drafts with DSpark, which is not exported"

#: How cached rows are kept: in the activations' type, or those that attention reads as E4M3 with multipliers.
AUTO, FP8 = "auto", "fp8"


@dataclass(frozen=True)
class Chosen:
    """Changes; None and False are none.

    Attributes:
        layers: how many first layers to keep.
        engram_inside: make Engram tables part of the graph.
        think_steps: of a thought; 0 leaves reasoning layers out.
        draft: export the first multi-token prediction layer, too.
        state: ``fp8``, how cached rows are kept; None is the activations' type.
    """

    layers: int | None = None
    engram_inside: bool = False
    think_steps: int | None = None
    state: str | None = None
    draft: bool = False

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Chosen:
        """What a manifest says.

        Raises:
            TypeError: that is something else.
        """
        found = cls(**stored)
        counts = (found.layers, found.think_steps)
        flags = (found.engram_inside, found.draft)
        if any(type(flag) is not bool for flag in flags) or any(type(n) not in (int, type(None)) for n in counts):
            raise TypeError(f"chosen: {stored!r}")
        if found.state not in (None, FP8):
            raise TypeError(f"chosen: {stored!r}")
        return found

    def of(self, config: ModelConfig) -> ModelConfig:
        """The model, changed.

        Raises:
            BadInput: it does not have what is to be changed.
        """
        if self.layers is not None and not 0 < self.layers <= config.num_layers:
            raise BadInput(
                f"layers 0:{self.layers} are not a first part of the model",
                f"it has {config.num_layers} layers",
                "give --layers 0:N",
            )
        if self.layers is not None:
            config = config.first_layers(self.layers)
        if self.engram_inside and config.engram is None:
            raise BadInput("this model has no Engram tables", fix="leave --engram-inside out")
        if config.engram:
            config = replace(config, engram=replace(config.engram, inside=self.engram_inside))
        if self.think_steps is not None and self.think_steps < 0:
            raise BadInput("a thought cannot have so many steps", f"{self.think_steps}", "give 0 or more")
        if self.think_steps and config.reasoning is None:
            raise BadInput("this model has no reasoning layers", fix="leave --think-steps out")
        if self.think_steps is not None and config.reasoning:
            config = replace(config, reasoning=replace(config.reasoning, steps=self.think_steps))
        if self.state not in (None, FP8):
            raise BadInput("state cannot be kept so", f"{self.state!r}, known: {AUTO}, {FP8}", "choose one of them")
        config = replace(config, state_fp8=True) if self.state else config
        if self.draft:
            _check_drafts(config)
        return replace(config, drafts=self.draft)


def _check_drafts(config: ModelConfig) -> None:
    """Raises where a model has nothing to draft with, or what it has cannot be exported."""
    if not config.num_mtp_layers:
        raise BadInput("this model has no multi-token prediction layer", fix="leave --draft out")
    if config.left_out_layers:
        why = f"{config.left_out_layers} of the layers before it are left out"
        raise BadInput("the prediction layer goes on from the last layer", why, "leave --layers or --draft out")
    if config.compressed and config.compressed.shared:
        raise NotSupported(DSPARK, "it has several stages, which draft a block at once", "leave --draft out")
    for what, there, fix in (
        ("reasoning layers", config.thinks, "leave them out: --think-steps 0"),
        ("Engram tables", config.engram is not None, "leave --draft out"),
    ):
        if there:
            raise NotSupported(f"a model with {what} is exported without drafts", fix=fix)


#: As the checkpoint has it.
UNCHANGED = Chosen()
