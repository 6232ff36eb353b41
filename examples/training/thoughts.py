"""Native reasoning layers in a form that can be trained: thoughts, and the predictions behind them.

The numbers are those of ``v4export/model/reasoning.py``, and parameters have the names of a checkpoint, below
``model.reasoning.``. As in Quiet-STaR (arXiv 2403.09629, sections 4.2 to 4.4), there are thoughts about several
positions side by side, and the true tokens that follow each may be fed on behind it. ``look_ahead.py`` has the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.model import Block, CausalLM, LatentAttention
from v4export.config import ModelConfig

#: How large embeddings are at the start, and what reasoning layers add, as a part of what other layers do. Every step
#: adds an embedding to the thought: where those are small, a thought begins as little more than the hidden state that
#: it starts from, and has nothing to unlearn.
EMBEDDED, ADDED = 0.1, 0.3
#: Keys and values of some tokens or steps.
Memory = tuple[Tensor, Tensor]


class Thoughts(NamedTuple):
    """What thoughts about Q positions of each sequence come to, and the predictions of A tokens behind each.

    Attributes:
        mixed: logits of the plain predictions with the thought mixed in, [B, Q, A, V].
        alone: logits of the thoughts, nothing mixed in, [B, Q, A, V].
        weight: how much of the thought is in a mixed prediction, [B, Q, A].
        log_prob: of all tokens drawn in a thought together, [B, Q]; 0 where none is drawn.
    """

    mixed: Tensor
    alone: Tensor
    weight: Tensor
    log_prob: Tensor


class ThoughtAttention(LatentAttention):
    """Attention of a thought's step, to tokens of the sequence and to the thought's own steps alone."""

    def about(
        self, x_BQD: Tensor, at_BQ: Tensor, sequence: Memory, visible_BQS: Tensor, own: Memory | None
    ) -> tuple[Tensor, Memory]:
        """One step.

        Args:
            x_BQD: normed hidden states.
            at_BQ: where the step stands.
            sequence: of its tokens, [B, S, H, N + R] and [B, S, H, V].
            visible_BQS: the tokens up to the one that a thought is about.
            own: of the thought's earlier steps, [B, Q, P, H, N + R] and [B, Q, P, H, V]; None at the first.

        Returns:
            [B, Q, D], and ``own`` with this step's behind it.
        """
        S = visible_BQS.shape[-1]
        query_BQHW = self.queries(x_BQD, at_BQ)
        new = [one.unsqueeze(2) for one in self.keys_and_values(x_BQD, at_BQ)]
        own_key, own_value = new if own is None else (torch.cat(pair, 2) for pair in zip(own, new, strict=True))
        key, value = (one.transpose(1, 2) for one in sequence)
        score_BHQS = (query_BQHW.transpose(1, 2) @ key.mT).masked_fill(~visible_BQS[:, None], float("-inf"))
        score_BHQP = (query_BQHW.unsqueeze(2) * own_key).sum(-1).permute(0, 3, 1, 2)
        share = (torch.cat([score_BHQS, score_BHQP], -1) * self.config.softmax_scale).softmax(-1)
        held_BHQS, own_BHQP = share.split([S, own_key.shape[2]], -1)
        out_BQHV = (held_BHQS @ value).transpose(1, 2) + (own_BHQP.permute(0, 2, 3, 1)[..., None] * own_value).sum(2)
        return self.o_proj(out_BQHV.flatten(-2)), (own_key, own_value)


class ReasoningLayer(Block):
    """A dense block whose attention is a thought's."""

    attention = ThoughtAttention

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        with torch.no_grad():
            for matrix in (self.self_attn.o_proj, self.mlp.down_proj):
                matrix.weight.mul_(ADDED)

    def remember(self, trunk_BSD: Tensor) -> Memory:
        """Keys and values of a sequence's tokens, from the model's last hidden states."""
        return self.self_attn.keys_and_values(self.input_layernorm(trunk_BSD), torch.arange(trunk_BSD.shape[1]))

    def step(
        self, z_BQD: Tensor, at_BQ: Tensor, sequence: Memory, visible_BQS: Tensor, own: Memory | None
    ) -> tuple[Tensor, Memory]:
        """One step, [B, Q, D]; as ``ThoughtAttention.about``, of hidden states that are not normed."""
        out_BQD, own = self.self_attn.about(self.input_layernorm(z_BQD), at_BQ, sequence, visible_BQS, own)
        z_BQD = z_BQD + out_BQD
        return z_BQD + self.mlp(self.post_attention_layernorm(z_BQD)), own


def talk_head(width: int) -> nn.Sequential:
    """From the plain hidden state and the thought's, [..., 2D], how much of the thought goes into a prediction.

    Its last layer is zero at the start, so that thoughts change nothing before they are any good.
    """
    head = nn.Sequential(
        nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1, bias=False)
    )
    nn.init.zeros_(head[4].weight)
    return head


class Reasoning(nn.Module):
    """What a model that thinks has beside its other parts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        own, width = config.thinker, config.hidden_size
        self.start_embedding, self.end_embedding = (nn.Parameter(EMBEDDED * torch.randn(width)) for _ in range(2))
        self.layers = nn.ModuleList(ReasoningLayer(own, layer) for layer in range(own.num_layers))
        self.talk_head = talk_head(width)


class ThinkingLM(CausalLM):
    """A model that can think before it predicts."""

    def __init__(self, config: ModelConfig, rows: Mapping[int, int] | None = None):
        super().__init__(config, rows)
        assert config.reasoning
        self.steps = config.reasoning.steps
        nn.init.normal_(self.model.embed_tokens.weight, std=EMBEDDED)
        self.model.reasoning = Reasoning(config)

    def think(
        self, trunk_BSD: Tensor, ids_BS: Tensor, about_BQ: Tensor, ahead: int = 1, sample: bool = False
    ) -> Thoughts:
        """A thought about each of Q positions, and predictions of the ``ahead`` tokens behind each.

        Behind the thought about position i, step K + l takes the true token i + l in, and its prediction is mixed with
        the plain one there.

        Args:
            trunk_BSD: last hidden states, before the final norm.
            ids_BS: the tokens.
            about_BQ: the positions, each with ``ahead`` - 1 tokens behind it.
            ahead: predictions of a thought.
            sample: draw the tokens of a thought from their distribution, instead of taking the likeliest.
        """
        reasoning = self.model.reasoning
        memory = [layer.remember(trunk_BSD) for layer in reasoning.layers]
        visible_BQS = torch.arange(trunk_BSD.shape[1]) <= about_BQ[..., None]
        own: list[Memory | None] = [None for _ in memory]
        z_BQD, log_prob = at(trunk_BSD, about_BQ), torch.zeros(about_BQ.shape)
        predicted = []
        for k in range(1, self.steps + ahead):
            if k == 1:
                entering = reasoning.start_embedding
            elif k == self.steps:
                entering = reasoning.end_embedding
            elif k < self.steps:
                token_BQ, new = self._next(z_BQD, sample)
                entering, log_prob = self.model.embed_tokens(token_BQ), log_prob + new
            else:
                entering = self.model.embed_tokens(ids_BS.gather(1, about_BQ + k - self.steps))
            z_BQD = z_BQD + entering
            for n, layer in enumerate(reasoning.layers):
                z_BQD, own[n] = layer.step(z_BQD, about_BQ + k, memory[n], visible_BQS, own[n])
            if k >= self.steps:
                predicted.append(self._mix(at(trunk_BSD, about_BQ + k - self.steps), z_BQD))
        return Thoughts(*(torch.stack(parts, 2) for parts in zip(*predicted, strict=True)), log_prob)

    def _next(self, z_BQD: Tensor, sample: bool) -> tuple[Tensor, Tensor | float]:
        """The token that a thought goes on with, and the logarithm of its probability where it is drawn."""
        if not sample:
            with torch.no_grad():
                return self.logits(z_BQD).argmax(-1), 0.0
        log_p_BQV = self.logits(z_BQD).log_softmax(-1)
        token_BQ = torch.multinomial(log_p_BQV.detach().exp().flatten(0, 1), 1).view(z_BQD.shape[:2])
        return token_BQ, log_p_BQV.gather(-1, token_BQ[..., None]).squeeze(-1)

    def _mix(self, trunk_BQD: Tensor, thought_BQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, Q, V] of the mixed prediction and of the thought's own, and the weight of the thought [B, Q]."""
        plain, thought = self.model.norm(trunk_BQD), self.model.norm(thought_BQD)
        weight_BQ1 = self.model.reasoning.talk_head(torch.cat([plain, thought], -1))
        mixed = (1 - weight_BQ1) * plain + weight_BQ1 * thought
        return self.lm_head(mixed), self.lm_head(thought), weight_BQ1.squeeze(-1)


def at(values: Tensor, index: Tensor) -> Tensor:
    """Of values [B, S] or [B, S, D] those at positions [B, ...]."""
    batch = torch.arange(len(index)).view(-1, *[1] * (index.dim() - 1))
    return values[batch, index]
