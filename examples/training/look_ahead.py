"""The loss of a training with thoughts (after Quiet-STaR, arXiv 2403.09629, section 4.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.loop import Rows, looked_up
from training.thoughts import ThinkingLM, at


@dataclass(frozen=True)
class LookAhead:
    """The mean of all plain predictions' losses, and that of the mixed ones behind some thoughts.

    Attributes:
        positions: of each window that are thought about, drawn anew each time.
        ahead: tokens that are predicted behind a thought.
        alone: what the thought's own prediction counts, nothing mixed in. The weight of a thought starts at zero: no
            gradient reaches the thought through the mixed prediction, and as long as thoughts are no good, none tells
            the talk head to give them weight. Predicting from thoughts alone breaks that circle.
        policy: what the REINFORCE term counts; 0 leaves it out, and thoughts are of the likeliest tokens.
    """

    positions: int
    ahead: int
    alone: float = 1.0
    policy: float = 0.0

    def __call__(self, model: ThinkingLM, rows: Rows, window: np.ndarray) -> Tensor:
        """Nats a token, of windows [B, S + 1]."""
        ids_BS, targets_BS = torch.from_numpy(window[:, :-1]), torch.from_numpy(window[:, 1:])
        trunk_BSD = model.model(ids_BS, looked_up(rows, window[:, :-1]))
        plain_BS = nats(model.logits(trunk_BSD), targets_BS)
        about_BQ = some_positions(*ids_BS.shape, self.positions, self.ahead)
        thoughts = model.think(trunk_BSD, ids_BS, about_BQ, self.ahead, sample=self.policy > 0)
        after_BQA = about_BQ[..., None] + torch.arange(self.ahead)
        wanted_BQA = at(targets_BS, after_BQA)
        mixed_BQA = nats(thoughts.mixed, wanted_BQA)
        loss = plain_BS.mean() + mixed_BQA.mean()
        if self.alone:
            loss = loss + self.alone * nats(thoughts.alone, wanted_BQA).mean()
        if self.policy:
            reward_BQ = (at(plain_BS, after_BQA) - mixed_BQA).mean(-1)
            loss = loss + self.policy * reinforce(thoughts.log_prob, reward_BQ)
        return loss


def reinforce(log_prob_BQ: Tensor, reward_BQ: Tensor) -> Tensor:
    """Makes thoughts likelier that helped more than the mean of the batch, and those less likely that helped less.

    Quiet-STaR takes the mean over several thoughts about a position, and drops what is below it (a ReLU); here there is
    one about each, the mean is over the batch, and what is below it counts too.

    Args:
        log_prob_BQ: of the tokens drawn in each thought.
        reward_BQ: how many nats the mixed predictions are better than the plain ones.
    """
    return -((reward_BQ - reward_BQ.mean()).detach() * log_prob_BQ).mean()


def some_positions(batch: int, length: int, count: int, ahead: int) -> Tensor:
    """Different positions of each sequence, in order, int64 [B, Q]; behind each there are ``ahead`` - 1 more."""
    there = length - ahead + 1
    return torch.rand(batch, there).topk(min(count, there)).indices.sort().values


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [...] of logits [..., V]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
