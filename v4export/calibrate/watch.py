"""Collects what linear layers and experts of a part of the definition multiply, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from v4export.calibrate.magnitudes import Magnitudes
from v4export.config import ModelConfig
from v4export.model.linear import Linear
from v4export.model.load import hub_name
from v4export.model.moe import Expert, Experts
from v4export.plugins.moe_experts.op import one_by_one, swiglu

#: By the name of a scale, what it is of: one, or one of every expert.
Watched = dict[str, list[Magnitudes]]


def watch(
    part: nn.Module,
    layer: int | None,
    config: ModelConfig,
    wanted: Mapping[str, tuple[int, ...]],
    make: Callable[[], Magnitudes],
) -> Watched:
    """Let a Block or a Head tell what its matrices multiply.

    Args:
        part: to be watched from now on.
        layer: index of a block.
        config: the model.
        wanted: names of scales; experts' have a dimension.
        make: what takes in the numbers of one scale.
    """
    found: Watched = {}

    def listen(module: nn.Module, name: str) -> None:
        seen = make()
        found.setdefault(name, []).append(seen)
        module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0]))

    for name, one in part.named_modules():
        path = hub_name(name, config, layer)
        if isinstance(one, Experts):
            one.forward = _each(one)  # type: ignore[method-assign, assignment]
            for expert in one:
                listen(expert.gate_proj, f"{path}.input_scale")  # type: ignore[arg-type]
                listen(expert.down_proj, f"{path}.middle_scale")  # type: ignore[arg-type]
        elif isinstance(one, Linear) and f"{path}.input_scale" in wanted:
            listen(one, f"{path}.input_scale")
    return found


def _each(experts: Experts) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Experts evaluated as modules, which can be listened to, and not by one op."""

    def one(e: int, x: torch.Tensor) -> torch.Tensor:
        expert = experts[e]
        assert isinstance(expert, Expert)
        return expert.down_proj(swiglu(expert.gate_proj(x), expert.up_proj(x), experts.limit).to(x.dtype))

    return lambda x_MD, weights_MK, idx_MK: one_by_one(x_MD, weights_MK, idx_MK, one)
