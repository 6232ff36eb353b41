"""The whole model: embedding, blocks, head. State goes in, new rows come out, and the caller puts them in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.block import STATE, Block, Embed, Head, block_shares, head_reads, head_returns
from v4export.model.draft import Drafter
from v4export.model.reasoning import ThinkingHead, Thought
from v4export.state_contract import state_tensors


class Step(NamedTuple):
    """What one step returns.

    Attributes:
        logits: float32 [B, Q, V].
        rows: per layer, reasoning layers behind the model's own, new rows by name.
        hidden: per layer of the model's own, hidden states.
        trunk: where the model can think, the last hidden states of the wanted positions, [B, Q, D].
        features: where it can draft, what drafts go on from, of all tokens, [B, S, D] or [B, S, X, D].
    """

    logits: torch.Tensor
    rows: list[dict[str, torch.Tensor]]
    hidden: list[torch.Tensor]
    trunk: torch.Tensor | None = None
    features: torch.Tensor | None = None


class Transformer(nn.Module):
    """A mixture-of-experts decoder (DeepSeek V2, V3, V3.2, V4 and V4.1, Kimi-K2)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, absorbed: bool = True):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = Embed(config, dtype)
        self.layers = nn.ModuleList(Block(config, i, dtype, absorbed) for i in range(config.num_layers))
        self.head = ThinkingHead(config, dtype, absorbed) if config.thinks else Head(config, dtype)
        self.drafter = Drafter(config, dtype, absorbed) if config.drafts else None

    def empty_state(self, batch: int = 1) -> list[dict[str, torch.Tensor]]:
        """A state that holds no token: per layer, tensors [B, rows, width] by name."""
        return [empty_state(self.config, layer, self.dtype, batch) for layer in range(self.config.state_layers)]

    def forward(
        self,
        ids_BS: torch.Tensor,
        position_B: torch.Tensor,
        state: Sequence[Mapping[str, torch.Tensor]],
        logits_at_BQ: torch.Tensor,
        engram: Mapping[int, torch.Tensor] | None = None,
        decoder_start_B: torch.Tensor | None = None,
    ) -> Step:
        """One step of any length over any number of cached tokens.

        Args:
            ids_BS: new tokens; sequences that have fewer are padded on the right.
            position_B: tokens already held by each sequence.
            state: per layer, its tensors (``v4export/state_contract.py``) by name.
            logits_at_BQ: which of the S new tokens' logits are wanted.
            engram: by layer, what was looked up for each token, [B, S, W]; numbers of rows where tables are inside.
            decoder_start_B: the first token that has passed the decoder of a model that has one; 0 unless given.
        """
        x, shared = self.embed.shared(ids_BS, position_B, decoder_start_B)
        rows, hidden = self._through(range(self.config.num_layers), x, shared, state, engram)
        shared["logits_at"] = logits_at_BQ
        said = self.head(*(shared[name] for name in head_reads(self.config)))
        if isinstance(self.head, ThinkingHead):
            rows += self.head.rows(shared["hidden"], position_B, shared.get("pre"))
        return Step(rows=rows, hidden=hidden, **dict(zip(head_returns(self.config), said, strict=True)))

    def think(
        self,
        trunk_BQD: torch.Tensor,
        thought_at_BQ: torch.Tensor,
        state: Sequence[Mapping[str, torch.Tensor]],
        steps: int | None = None,
    ) -> Thought:
        """Thoughts about positions whose rows the state holds; nothing of them is kept.

        Args:
            trunk_BQD: what ``forward`` returned of them.
            thought_at_BQ: the positions, int64.
            state: per layer, its tensors by name.
            steps: of a thought; the model's own number unless given.
        """
        assert isinstance(self.head, ThinkingHead)
        layers = range(self.config.num_layers, self.config.state_layers)
        held = [state[layer][tensor.name] for layer in layers for tensor in state_tensors(self.config, layer)]
        return self.head.think(trunk_BQD, thought_at_BQ, *held, steps=steps)

    def remember(
        self,
        ids_BS: torch.Tensor,
        position_B: torch.Tensor,
        state: Sequence[Mapping[str, torch.Tensor]],
        engram: Mapping[int, torch.Tensor] | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """One step of tokens that are only to be remembered, of a model with a decoder; arguments as for ``forward``.

        Returns:
            New rows of the layers before the decoder, and what ``remembered`` says of its first layer's.
        """
        assert self.config.compressed and self.config.compressed.shared
        decoder = self.config.compressed.shared.decoder
        x, shared = self.embed.shared(ids_BS, position_B)
        rows, _ = self._through(range(decoder), x, shared, state, engram)
        if self.config.has_engram(decoder) and engram is not None:
            shared["engram"] = engram[decoder]
        first: Block = self.layers[decoder]  # type: ignore[assignment]
        return [*rows, first.entries(shared["hidden"], shared, state[decoder])]

    def _through(
        self,
        layers: range,
        x: torch.Tensor,
        shared: dict[str, torch.Tensor],
        state: Sequence[Mapping[str, torch.Tensor]],
        engram: Mapping[int, torch.Tensor] | None,
    ) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
        """New rows and hidden states of some layers; ``shared`` gains what they share."""
        shared["hidden"] = x
        rows, hidden = [], []
        for i in layers:
            if self.config.has_engram(i):
                assert engram is not None
                shared["engram"] = engram[i]
            out = self.layers[i](shared["hidden"], shared, state[i])
            named = out.named() | {STATE + name: value for name, value in state[i].items()}
            shared |= {name: named[own] for name, own in block_shares(self.config, i).items()}
            rows.append({tensor.name: out.rows[tensor.name] for tensor in state_tensors(self.config, i)})
            hidden.append(out.hidden)
        return rows, hidden


def empty_state(config: ModelConfig, layer: int, dtype: torch.dtype, batch: int = 1) -> dict[str, torch.Tensor]:
    """One layer's state that holds no token."""
    return {
        t.name: torch.zeros(batch, t.ring or 0, t.width, dtype=getattr(torch, t.dtype) if t.dtype else dtype)
        for t in state_tensors(config, layer)
    }
