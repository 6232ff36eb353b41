"""Training one model, and measuring it on text it has not seen."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.data import batches
from training.model import CausalLM
from training.recipe import Training

#: Rows that token ids [B, S] look up, by layer; nothing where a model has no memory.
Rows = Callable[[np.ndarray], dict[int, np.ndarray]]
#: What a step lowers, of a model and windows [B, S + 1].
Loss = Callable[[Any, Rows, np.ndarray], Tensor]
#: How good a model is on such windows, in nats a token.
Measure = Callable[[Any, Rows, np.ndarray], float]


@dataclass
class Run:
    """What a training gave.

    Attributes:
        tokens: seen, at each measurement.
        losses: nats per held-out token then.
        seconds: of training, without measurements.
        busiest: tokens of the fullest expert over the mean, the worst layer at the end.
    """

    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    busiest: float = 0.0


def no_rows(ids_BS: np.ndarray) -> dict[int, np.ndarray]:
    """Of a model without memory."""
    return {}


def loss_of(model: CausalLM, rows: Rows, window: np.ndarray, reduction: str = "mean") -> Tensor:
    """Cross entropy in nats of [B, S + 1] tokens after the first."""
    ids, targets = window[:, :-1], torch.from_numpy(window[:, 1:]).flatten()
    logits = model(torch.from_numpy(ids), looked_up(rows, ids))
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction=reduction)


def looked_up(rows: Rows, ids_BS: np.ndarray) -> dict[int, Tensor]:
    """What a model looks up for tokens, [B, S, hashes] by layer."""
    return {layer: torch.from_numpy(one) for layer, one in rows(ids_BS).items()}


@torch.no_grad()
def held_out_loss(model: CausalLM, rows: Rows, data: np.ndarray, size: int = 16) -> float:
    """Mean nats per token over all windows."""
    model.eval()
    total = sum(loss_of(model, rows, data[n : n + size], "sum").item() for n in range(0, len(data), size))
    model.train()
    model.clear_loads()
    return total / data[:, 1:].size


def optimizer(model: CausalLM, options: Training) -> torch.optim.Optimizer:
    """Adam with decoupled decay of matrices; tables learn faster and do not decay."""
    moving = [one for one in model.parameters() if one.requires_grad]
    known = {id(one) for one in model.tables()}
    tables, rest = ([one for one in moving if (id(one) in known) is wanted] for wanted in (True, False))
    wide = [one for one in rest if one.dim() > 1 and min(one.shape) > 1]
    flat = [one for one in rest if one.dim() < 2 or min(one.shape) == 1]
    groups = [
        {"params": wide, "scale": 1.0, "weight_decay": options.decay},
        {"params": flat, "scale": 1.0, "weight_decay": 0.0},
        {"params": tables, "scale": options.table_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([one for one in groups if one["params"]], betas=options.betas, fused=True)


def rate(step: int, options: Training) -> float:
    """Rises over the warm-up, then falls along a cosine."""
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return options.rate * (step + 1) / warm
    falling = (1 + math.cos(math.pi * (step - warm) / max(1, options.steps - warm))) / 2
    return options.rate * (options.end + (1 - options.end) * falling)


def train(
    model: CausalLM,
    rows: Rows,
    train_data: np.ndarray,
    held_out: np.ndarray,
    options: Training,
    seed: int,
    name: str,
    loss: Loss = loss_of,
    measure: Measure = held_out_loss,
) -> Run:
    """Trains a model in place, what does not require a gradient left alone; progress goes to stderr."""
    run, adam = Run(), optimizer(model, options)
    source = batches(train_data, options.batch, seed)
    when = {round(options.steps * (n + 1) / options.measurements) for n in range(options.measurements)}
    for step in range(options.steps):
        start = time.perf_counter()
        for group in adam.param_groups:
            group["lr"] = rate(step, options) * group["scale"]
        loss(model, rows, next(source)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        adam.step()
        adam.zero_grad()
        run.busiest = max((r.load.max() / r.load.mean()).item() for r in model.routers())
        for router in model.routers():
            router.balance(options.balance)
        run.seconds += time.perf_counter() - start
        if step + 1 in when:
            run.tokens.append((step + 1) * options.batch * options.window)
            run.losses.append(measure(model, rows, held_out))
            line = f"{name}: {run.tokens[-1]:>9,} tokens  {run.losses[-1]:.4f} nats  {run.seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)
    return run
