"""Reasoning layers: thoughts about a position, and how much of one goes into its prediction.

After Quiet-STaR (arXiv 2403.09629), whose thoughts pass the whole model; here they pass a few dense layers behind it.
With z_0 the model's last hidden state at a position, a thought of K steps is

    z_k = layers(z_{k-1} + e_k)     e_1 = start, e_K = end, else the embedding of argmax lm_head(norm(z_{k-1}))
    w   = talk_head([norm(z_0) | norm(z_K)])
    logits = lm_head((1 - w) norm(z_0) + w norm(z_K))

Step k of a thought about token i stands at position i + k. In each layer it attends to a row for every token up to i,
made of that token's own z_0 whether it was thought about or not, and to the thought's own steps. So a thought leaves
nothing behind, and several positions can be thought about side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.attended import Attended
from v4export.model.block import Block, Head
from v4export.model.linear import Linear, parameter
from v4export.model.mla import LatentAttention, Projected
from v4export.model.rope import angles, rotation, rotations
from v4export.model.rows import keep, read
from v4export.plugins.thought_attention.op import thought_attention
from v4export.state_contract import state_tensors


class Thought(NamedTuple):
    """What a thought comes to.

    Attributes:
        logits: of the mixed prediction, float32 [B, Q, V].
        weight: how much of the thought is in it, float32 [B, Q]; not limited to 0 .. 1.
        tokens: that were thought, int64 [B, Q, K - 2]; None where there are no more than two steps.
        hidden: after each layer of each step, [M, D] with M = B*Q.
    """

    logits: Tensor
    weight: Tensor
    tokens: Tensor | None
    hidden: list[list[Tensor]]


class ThoughtStep(NamedTuple):
    """What one step comes to.

    Attributes:
        thought: [B, Q, D], for the next step, or to be mixed.
        token: the likeliest after it, int64 [B, Q].
        rows: of each layer, those of the thoughts' steps so far, [P + 1, B, Q, W].
        hidden: after each layer, [M, D].
    """

    thought: Tensor
    token: Tensor
    rows: list[Tensor]
    hidden: list[Tensor]


class ThoughtAttention(LatentAttention):
    """Attention of one step of thoughts: to rows of the sequence, and to those of the thought."""

    def forward(
        self,
        x_MD: Tensor,
        shared: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        selected_MK: Tensor | None = None,
    ) -> Attended:
        """One step.

        Args:
            x_MD: normed hidden states of B*Q thoughts.
            shared: ``thought_at`` [B, Q], the token each is about; ``cos.main`` and ``sin.main`` [1, M, R/2].
            state: ``latent`` [B, T, W], rows of the sequence; ``own`` [P, M, W], of the thoughts' earlier steps.
            selected_MK: nothing selects here.

        Returns:
            As every attention; its rows are ``own`` with this step's behind them.
        """
        parts, at_BQ = self.project(x_MD, *rotation(shared, "main")), shared["thought_at"]
        row_1MW, cache_BTW = parts.row_MW.unsqueeze(0), state["latent"]
        own_PMW = torch.cat([state["own"], row_1MW]) if "own" in state else row_1MW
        own_MPW = own_PMW.transpose(0, 1)
        if self.absorbed:
            sizes = self.config.kv_lora_rank, self.config.softmax_scale
            out_MHV = self.over_latents(parts, lambda q: thought_attention(q, own_MPW, cache_BTW, at_BQ, *sizes))
        else:
            out_MHV = self._written_out(parts, own_MPW, cache_BTW, at_BQ)
        return Attended(self.output(out_MHV), {"own": own_PMW})

    def _written_out(self, parts: Projected, own_MPW: Tensor, cache_BTW: Tensor, at_BQ: Tensor) -> Tensor:
        """Every thought as a sequence of its own, with a copy of the rows it sees."""
        Q, T = at_BQ.shape[1], cache_BTW.shape[1]
        rows_MUW = torch.cat([cache_BTW.repeat_interleave(Q, 0), own_MPW], 1)
        held_MT = torch.arange(T) <= at_BQ.reshape(-1, 1)
        visible = torch.cat([held_MT, held_MT.new_ones(own_MPW.shape[:2])], 1)
        return self.naive(parts, rows_MUW, visible[:, None])


class ReasoningLayer(Block):
    """A dense block whose attention is a thought's."""

    @staticmethod
    def _attention(config: ModelConfig, layer: int, dtype: torch.dtype, absorbed: bool) -> nn.Module:
        return ThoughtAttention(config, dtype, absorbed)


class TalkHead(nn.Sequential):
    """How much of a thought helps, judged from the plain hidden state and the thought's."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__(
            Linear(2 * width, width, dtype, bias=True),
            nn.ReLU(),
            Linear(width, width, dtype, bias=True),
            nn.ReLU(),
            Linear(width, 1, dtype),
        )

    def forward(self, both_MC: Tensor) -> Tensor:
        """[M, 2D] -> float32 [M]."""
        return super().forward(both_MC).squeeze(-1).float()


class Reasoning(nn.Module):
    """The weights below ``model.reasoning``."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, absorbed: bool):
        super().__init__()
        own = config.thinker
        self.start_embedding = parameter(config.hidden_size, dtype=dtype)
        self.end_embedding = parameter(config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(ReasoningLayer(own, i, dtype, absorbed) for i in range(own.num_layers))
        self.talk_head = TalkHead(config.hidden_size, dtype)


class ThinkingHead(Head):
    """The head of a model that can think before it speaks."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, absorbed: bool = True):
        super().__init__(config, dtype)
        assert config.reasoning is not None
        self.steps, self.width = config.reasoning.steps, config.thinker.qk_rope_head_dim
        self.rotation = rotations(config.thinker)["main"]
        table = parameter(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_tokens = nn.ParameterDict({"weight": table})
        self.reasoning = Reasoning(config, dtype, absorbed)

    def rows(self, hidden: Tensor, position_B: Tensor, pre_MX: Tensor | None = None) -> list[dict[str, Tensor]]:
        """What each reasoning layer keeps of a step's tokens, by name, from the model's last hidden states."""
        trunk_MD, B = self.collapsed(hidden, pre_MX), position_B.shape[0]
        turned = angles(self.rotation, self.width, position_B, trunk_MD.shape[0] // B)
        rows = [one.self_attn.rows(one.input_layernorm(trunk_MD), *turned) for one in self._layers()]
        return [keep(self.config.thinker, "latent", row_MW.unflatten(0, (B, -1)), {}).tensors for row_MW in rows]

    def think(self, trunk_BQD: Tensor, thought_at_BQ: Tensor, *state: Tensor, steps: int | None = None) -> Thought:
        """A whole thought about each of Q positions.

        Args:
            trunk_BQD: the model's last hidden states there.
            thought_at_BQ: the positions.
            state: of each reasoning layer, its tensors (``v4export/state_contract.py``) in order; rows behind a
                position are ignored.
            steps: of the thought; the model's own number unless given.
        """
        steps = self.steps if steps is None else steps
        trunk_MD, shape = trunk_BQD.flatten(0, 1), thought_at_BQ.shape
        latents, z_MD, tokens, hidden = self._latents(state, trunk_MD.dtype), trunk_MD, [], []
        own: list[dict[str, Tensor]] = [{} for _ in latents]
        for k in range(1, steps + 1):
            entering: Tensor = self.reasoning.start_embedding if k == 1 else self.reasoning.end_embedding
            if 1 < k < steps:
                tokens.append(self.token(z_MD))
                entering = nn.functional.embedding(tokens[-1], self.embed_tokens["weight"])
            each, own = self._step(z_MD + entering, thought_at_BQ, latents, own)
            z_MD = each[-1]
            hidden.append(each)
        logits, weight = self._mix(trunk_MD, z_MD)
        thought = torch.stack(tokens, -1).unflatten(0, shape) if tokens else None
        return Thought(logits.unflatten(0, shape), weight.unflatten(0, shape), thought, hidden)

    def step(self, thought_BQD: Tensor, entering_BQ: Tensor, thought_at_BQ: Tensor, *rest: Tensor) -> ThoughtStep:
        """One step of thoughts, for a caller that loops.

        Args:
            thought_BQD: what the step before it returned; for the first, the model's last hidden states.
            entering_BQ: the token that enters; V for the start of a thought, and V + 1 for its end.
            thought_at_BQ: the positions.
            rest: of each reasoning layer, its tensors as for ``think``; then of each, rows of the thoughts' earlier
                steps [P, B, Q, W], none at first.
        """
        count, shape = len(rest) - len(self.reasoning.layers), thought_at_BQ.shape
        latents, own = rest[:count], [{"own": rows.flatten(1, 2)} for rows in rest[count:]]
        x_MD = thought_BQD.flatten(0, 1) + self._entering(entering_BQ.reshape(-1))
        hidden, own = self._step(x_MD, thought_at_BQ, self._latents(latents, x_MD.dtype), own)
        token_BQ = self.token(hidden[-1]).unflatten(0, shape)
        rows = [one["own"].unflatten(1, shape) for one in own]
        return ThoughtStep(hidden[-1].unflatten(0, shape), token_BQ, rows, hidden)

    def mix(self, trunk_BQD: Tensor, thought_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, V] of the mixed prediction and the weight of the thought [B, Q], float32."""
        shape = trunk_BQD.shape[:2]
        logits, weight = self._mix(trunk_BQD.flatten(0, 1), thought_BQD.flatten(0, 1))
        return logits.unflatten(0, shape), weight.unflatten(0, shape)

    def shared(self, thought_at_BQ: Tensor, k: int) -> dict[str, Tensor]:
        """What layers read in step k, besides hidden states and rows."""
        cos, sin = angles(self.rotation, self.width, thought_at_BQ.reshape(-1) + k, 1)
        return {"thought_at": thought_at_BQ, "cos.main": cos, "sin.main": sin}

    def token(self, z_MD: Tensor) -> Tensor:
        """The token that is thought next, int64 [M]."""
        return self.logits(self.norm(z_MD)).argmax(-1)

    def _latents(self, state: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Of each reasoning layer, rows of the sequence [B, T, W], from all layers' tensors."""
        given, own = iter(state), self.config.thinker
        layers = ({t.name: next(given) for t in state_tensors(own, j)} for j in range(own.num_layers))
        return [read(tensors, dtype)["latent"] for tensors in layers]

    def _layers(self) -> Iterator[Any]:
        return iter(self.reasoning.layers)

    def _entering(self, ids_M: Tensor) -> Tensor:
        """What enters for a token, or for the two that are not in the vocabulary, [M, D]."""
        last = self.config.vocab_size - 1
        x_MD = nn.functional.embedding(ids_M.clamp(max=last), self.embed_tokens["weight"])
        for i, vector in enumerate((self.reasoning.start_embedding, self.reasoning.end_embedding), last + 1):
            x_MD = torch.where((ids_M == i)[:, None], vector, x_MD)
        return x_MD

    def _step(
        self, x_MD: Tensor, at_BQ: Tensor, latents: Sequence[Tensor], own: Sequence[Mapping[str, Tensor]]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """One step through all layers: hidden states after each, and the thoughts' rows with this step's."""
        k = 1 + (own[0]["own"].shape[0] if own[0] else 0)
        shared = self.shared(at_BQ, k)
        hidden, rows = [], []
        for layer, latent, before in zip(self._layers(), latents, own, strict=True):
            out = layer(x_MD, shared, {"latent": latent, **before})
            x_MD = out.hidden
            hidden.append(x_MD)
            rows.append(out.rows)
        return hidden, rows

    def _mix(self, trunk_MD: Tensor, thought_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, V] and weights [M]. With a weight of zero they are the plain logits, bit for bit."""
        plain, thought = self.norm(trunk_MD), self.norm(thought_MD)
        weight_M = self.reasoning.talk_head(torch.cat([plain, thought], -1))
        mixed = (1 - weight_M)[:, None] * plain.float() + weight_M[:, None] * thought.float()
        return self.logits(mixed.to(plain.dtype)), weight_M
