"""Multi-token prediction: one more layer that says what comes after the next token, given which that is.

With f_i what the model has made of token i, and t the tokens,

    x_i = W [norm_e(emb(t_{i+1})) | norm_h(f_i)]        DeepSeek-V3 (arXiv 2412.19437, section 2.2); f normed
    x_ij = W_e norm_e(emb(t_{i+1})) + W_h norm_h(f_ij)  DeepSeek-V4, for each stream j of f

pass one block; its own norm, and the model's head, give logits of t_{i+2}. What the block has made of t_{i+1} stands in
for f_{i+1}, so that the layer can draft further ahead. Embedding and head are the model's own.

For the first, f is what follows the model's last norm, as in transformers, and what follows the layer's own norm stands
in for it. Rows of the block's state are numbered by i, of which attention sees differences alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.block import Block, Embed, Head
from v4export.model.linear import Linear
from v4export.model.norm import RMSNorm


class Draft(NamedTuple):
    """What a step of the layer returns.

    Attributes:
        logits: float32 [B, Q, V].
        features: what to draft further from, of each token as ``Head.features``.
        rows: new rows of the layer's state, by name.
        hidden: [M, D] or [M, X, D], ahead of the block and after it.
    """

    logits: Tensor
    features: Tensor
    rows: dict[str, Tensor]
    hidden: tuple[Tensor, Tensor]


class DraftEntry(Embed):
    """What the block is given."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__(config, dtype)
        D = config.hidden_size
        self.enorm, self.hnorm = RMSNorm(D, config.rms_norm_eps, dtype), RMSNorm(D, config.rms_norm_eps, dtype)
        if config.hyper:
            self.e_proj, self.h_proj = Linear(D, D, dtype), Linear(D, D, dtype)
        else:
            self.eh_proj = Linear(2 * D, D, dtype)

    def forward(self, ids_BS: Tensor, position_B: Tensor, features: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """As ``embed_returns`` says.

        Args:
            ids_BS: of each token the one that follows it.
            position_B: rows that the layer holds already.
            features: of each token, [B, S, D] or [B, S, X, D].
        """
        if self.config.hyper:
            e_M1D, h_MXD = self.summands(ids_BS, features)
            hidden = e_M1D + h_MXD
        else:
            hidden = self.eh_proj(torch.cat(self._normed(ids_BS, features), -1))
        return hidden, *self.turned(ids_BS, position_B)

    def summands(self, ids_BS: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the token adds and what the features do, [M, D]; or [M, 1, D] and [M, X, D]."""
        e_MD, h = self._normed(ids_BS, features)
        if self.config.hyper:
            return self.e_proj(e_MD).unsqueeze(1), self.h_proj(h)
        none_MD = torch.zeros_like(e_MD)
        return self.eh_proj(torch.cat([e_MD, none_MD], -1)), self.eh_proj(torch.cat([none_MD, h], -1))

    def _normed(self, ids_BS: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.enorm(self.embedded(ids_BS)), self.hnorm(features.flatten(0, 1))


class Drafter(nn.Module):
    """The layer with both of its ends; ``config`` is the whole model's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, absorbed: bool = True):
        super().__init__()
        own = config.drafter
        self.entry, self.block, self.head = DraftEntry(own, dtype), Block(own, 0, dtype, absorbed), Head(own, dtype)

    def forward(
        self,
        ids_BS: Tensor,
        position_B: Tensor,
        features: Tensor,
        state: Mapping[str, Tensor],
        logits_at_BQ: Tensor,
    ) -> Draft:
        """One step; arguments as of ``DraftEntry``, the layer's state by name, and which logits are wanted."""
        entered, shared = self.entry.shared(ids_BS, position_B, features=features)
        out = self.block(entered, shared, state)
        logits, handed = self.head(out.hidden, logits_at_BQ)
        return Draft(logits, handed, out.rows, (entered, out.hidden))
