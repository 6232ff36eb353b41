"""Whether each norm of a graph has the definition's epsilon: numbers show that only where it is above a rounding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.block import Block, Head
from v4export.model.draft import DraftEntry
from v4export.model.load import hub_name
from v4export.model.norm import LayerNorm, RMSNorm
from v4export.model.reasoning import ThinkingHead

_NORMS = ("RMSNormalization", "LayerNormalization")


def norm_faults(model: ir.Model, config: ModelConfig) -> Iterator[str]:
    """What is wrong with the norms of a portable graph, a line each."""
    wanted = _epsilons(config)
    for node in (node for node in model.graph if node.op_type in _NORMS):
        weight = node.inputs[1]
        epsilon = wanted.get(weight.name or "") if weight is not None else None
        found = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5  # ONNX's own
        if epsilon is not None and np.float32(found) != np.float32(epsilon):
            yield f"{node.name}: epsilon is {found:g}, and should be {epsilon:g}"


def _epsilons(config: ModelConfig) -> dict[str, float]:
    """Of every norm of the definition, by its weight's name."""
    with torch.device("meta"):
        parts: list[tuple[nn.Module, int | None]] = [(Head(config), None)]
        parts += [(Block(config, layer, experts=1), layer) for layer in range(config.num_layers)]
        parts += [(ThinkingHead(config), None)] if config.thinks else []
        if config.drafts:
            own = config.drafter
            parts += [(one, config.num_layers) for one in (DraftEntry(own), Block(own, 0, experts=1), Head(own))]
    return {
        hub_name(f"{name}.weight", config, layer) or "": module.eps
        for part, layer in parts
        for name, module in part.named_modules()
        if isinstance(module, RMSNorm | LayerNorm)
    }
