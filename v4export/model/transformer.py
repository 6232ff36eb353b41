"""The whole model: embedding, blocks, head. State goes in, new rows come out, and the caller puts them in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.block import Block, Embed, Head
from v4export.model.linear import IN_FLOAT32, Storage
from v4export.state_contract import state_tensors


class Step(NamedTuple):
    """What one step returns: logits float32 [B, Q, V], and per layer new rows by name and hidden states."""

    logits: torch.Tensor
    rows: list[dict[str, torch.Tensor]]
    hidden: list[torch.Tensor]


class Transformer(nn.Module):
    """A mixture-of-experts decoder (DeepSeek V2, V3, V3.2 and V4, Kimi-K2)."""

    def __init__(self, config: ModelConfig, storage: Storage = IN_FLOAT32, absorbed: bool = True):
        super().__init__()
        self.config, self.storage = config, storage
        self.embed = Embed(config, storage)
        self.layers = nn.ModuleList(Block(config, i, storage, absorbed) for i in range(config.num_layers))
        self.head = Head(config, storage)

    def empty_state(self, batch: int = 1) -> list[dict[str, torch.Tensor]]:
        """A state that holds no token: per layer, tensors [B, rows, width] by name."""
        return [empty_state(self.config, layer, self.storage.dtype, batch) for layer in range(self.config.num_layers)]

    def forward(
        self,
        ids_BS: torch.Tensor,
        position_B: torch.Tensor,
        state: Sequence[Mapping[str, torch.Tensor]],
        logits_at_BQ: torch.Tensor,
    ) -> Step:
        """One step of any length over any number of cached tokens.

        Args:
            ids_BS: new tokens; sequences that have fewer are padded on the right.
            position_B: tokens already held by each sequence.
            state: per layer, its tensors (``v4export/state_contract.py``) by name.
            logits_at_BQ: which of the S new tokens' logits are wanted.
        """
        x, shared = self.embed.shared(ids_BS, position_B)
        rows, hidden = [], []
        for i, (layer, held) in enumerate(zip(self.layers, state, strict=True)):
            out = layer(x, shared, held)
            x = out.hidden
            names = (tensor.name for tensor in state_tensors(self.config, i))
            rows.append(dict(zip(names, out.rows, strict=True)))
            hidden.append(x)
        return Step(self.head(x, logits_at_BQ), rows, hidden)


def empty_state(config: ModelConfig, layer: int, dtype: torch.dtype, batch: int = 1) -> dict[str, torch.Tensor]:
    """One layer's state that holds no token."""
    return {
        t.name: torch.zeros(batch, t.ring or 0, t.width, dtype=torch.float32 if t.float32 else dtype)
        for t in state_tensors(config, layer)
    }
