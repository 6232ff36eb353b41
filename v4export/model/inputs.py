"""Inputs of linear layers and experts rounded to FP8: who rounds, and by which scales.

``set_input_scales`` is the one call that gives a Block or a Head of the definition its scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.linear import Linear
from v4export.model.load import hub_name
from v4export.model.moe import Expert, Experts

#: How scales are called beside the module they belong to: of what a linear layer, or experts' gates and ups, read; of
#: what experts' downs read.
INPUT, MIDDLE = "input_scale", "middle_scale"


def round_inputs(module: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """Let linear layers and experts inside round what they read from now on; scales are uninitialised.

    Args:
        module: a part of the definition.
        wanted: from the name of a matrix within the module, whether what it multiplies is rounded. Experts of a layer
            all do as the first's gates do.
    """
    of_experts: set[nn.Module] = set()
    for name, one in module.named_modules():
        if isinstance(one, Experts) and wanted(f"{name}.0.gate_proj.weight"):
            one.round_inputs()
        elif isinstance(one, Expert):
            of_experts |= set(one.children())
        elif isinstance(one, Linear) and one not in of_experts and wanted(f"{name}.weight"):
            one.round_inputs()
    return module


def set_input_scales(
    module: nn.Module, scales: Mapping[str, np.ndarray], layer: int | None, config: ModelConfig
) -> nn.Module:
    """Let those parts of a Block, or of an end of the stack, round what they read for which there is a scale.

    Args:
        module: the part; the weights that it holds stay.
        scales: float32 [] by Hub name, ``model.layers.0.self_attn.o_proj.input_scale``; of experts [E],
            ``model.layers.3.mlp.experts.input_scale`` and ``.middle_scale``. ``wanted_scales`` of
            ``v4export/checkpoint/activation_scales.py`` leaves those of a recipe.
        layer: index of a block.
        config: the model.
    """

    def wanted(matrix: str) -> bool:
        owner = matrix.removesuffix(".0.gate_proj.weight").removesuffix(".weight")
        return hub_name(f"{owner}.{INPUT}", config, layer) in scales

    for name, one in round_inputs(module, wanted).named_parameters():
        if name.rpartition(".")[2] in (INPUT, MIDDLE):
            one.data.copy_(torch.from_numpy(np.array(scales[str(hub_name(name, config, layer))])))
    return module
