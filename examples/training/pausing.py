"""What thinking brings: losses with and without it, and where to pause for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.look_ahead import nats
from training.loop import Rows, looked_up
from training.thoughts import ThinkingLM

#: Thresholds are multiples of it.
GRID = 0.05


@dataclass(frozen=True)
class Predictions:
    """Of every token of some text, with its whole window before it.

    Attributes:
        plain: nats without a thought, [tokens].
        mixed: nats with one.
        entropy: of the prediction without one, in nats.
        weight: of the thought.
    """

    plain: Tensor
    mixed: Tensor
    entropy: Tensor
    weight: Tensor

    def auto(self, threshold: float) -> tuple[float, float]:
        """Mean nats where only predictions with an entropy above the threshold are thought about, and their share."""
        pausing = self.entropy > threshold
        return torch.where(pausing, self.mixed, self.plain).mean().item(), pausing.float().mean().item()


@torch.no_grad()
def predictions(model: ThinkingLM, rows: Rows, data: np.ndarray, size: int = 8) -> Predictions:
    """Of windows [windows, S + 1], thinking about every position."""
    parts = []
    for n in range(0, len(data), size):
        ids, targets = data[n : n + size, :-1], torch.from_numpy(data[n : n + size, 1:])
        trunk_BSD = model.model(torch.from_numpy(ids), looked_up(rows, ids))
        logits = model.logits(trunk_BSD)
        about_BQ = torch.arange(ids.shape[1]).expand(ids.shape)
        thoughts = model.think(trunk_BSD, torch.from_numpy(ids), about_BQ)
        mixed = nats(thoughts.mixed[:, :, 0], targets)
        parts.append((nats(logits, targets), mixed, entropy(logits), thoughts.weight[..., 0]))
    model.clear_loads()
    return Predictions(*(torch.cat(part).flatten() for part in zip(*parts, strict=True)))


def loss_with_thoughts(model: ThinkingLM, rows: Rows, data: np.ndarray) -> float:
    """Mean nats per token over all windows, thinking about every position."""
    return predictions(model, rows, data).mixed.mean().item()


def entropy(logits: Tensor) -> Tensor:
    """In nats, [...] of [..., V]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def best_threshold(found: Predictions, vocab: int, keep: float) -> float:
    """The highest threshold at which pausing keeps a part of what thinking everywhere gains.

    The highest of all, ln(vocab), never pauses; that is what comes out where thinking gains nothing.
    """
    never, always = found.plain.mean().item(), found.mixed.mean().item()
    limit = never - keep * (never - always)
    grid = [round(n * GRID, 2) for n in range(math.ceil(math.log(vocab) / GRID) + 1)]
    return max(one for one in grid if found.auto(one)[0] <= limit)
