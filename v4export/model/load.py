"""Fills the model's parameters, whose names follow from the Hub's vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.transformer import Transformer

#: A function from a Hub tensor name to its float values.
Lookup = Callable[[str], torch.Tensor]


#: What a layer that drafts shares with the model, and what it calls otherwise.
_MODEL_S_OWN = ("embed_tokens.weight",)
_OF_A_DRAFTER = {"norm.weight": "shared_head.norm.weight"}


def hub_name(name: str, config: ModelConfig, layer: int | None = None) -> str | None:
    """Hub tensor of a parameter, or None where the checkpoint has none and the parameter is zero.

    Args:
        name: of a parameter of an ``Embed``, ``Block`` or ``Head``.
        config: decides whether the head is tied to the embedding, and whether the router has a correction bias.
        layer: index of a block; of the one that drafts also for an ``Embed`` or ``Head`` of its own.
    """
    if name.startswith("lm_head."):
        return "model.embed_tokens.weight" if config.tie_word_embeddings else name
    if name == "mlp.gate.e_score_correction_bias" and config.topk_method != "noaux_tc":
        return None
    if layer is None or name in _MODEL_S_OWN:
        return f"model.{name}"
    return f"model.layers.{layer}.{_OF_A_DRAFTER.get(name, name)}"


def fill(module: nn.Module, config: ModelConfig, lookup: Lookup, layer: int | None = None) -> None:
    """Copy every parameter of one part from the checkpoint."""
    for name, parameter in module.named_parameters():
        stored = hub_name(name, config, layer)
        if stored:
            parameter.data.copy_(lookup(stored))


def load_transformer(config: ModelConfig, lookup: Lookup, **options: object) -> Transformer:
    """A whole model in memory; ``options`` as for :class:`Transformer`."""
    model = Transformer(config, **options)  # type: ignore[arg-type]
    fill(model.embed, config, lookup)
    for i, layer in enumerate(model.layers):
        fill(layer, config, lookup, i)
    fill(model.head, config, lookup)
    for part in model.drafter.children() if model.drafter else ():
        fill(part, config, lookup, config.num_layers)
    return model.eval()
