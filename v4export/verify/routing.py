"""Whether experts that the graph chose and the reference did not are a near tie, or wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4export.config import ModelConfig
from v4export.model.moe import Router
from v4export.plugins.moe_route.op import expert_scores


@dataclass(frozen=True)
class Choices:
    """How choices of experts, or selections of tokens or entries, compare over all tokens of a sequence.

    Attributes:
        ties: tokens whose choice differs within what rounding explains.
        wrong: one line for each token whose choice differs by more.
        evidence: one line for each of ``ties``.
        selective: tokens that had more to choose from than they may take.
    """

    ties: int
    wrong: tuple[str, ...]
    evidence: tuple[str, ...] = ()
    selective: int = 0


def numbers(values: Sequence[int]) -> str:
    """A set of numbers in words, shortened."""
    return f"[{', '.join(map(str, sorted(values)[:8]))}{', ..' if len(values) > 8 else ''}]"


def compare_choices(
    router: Router,
    config: ModelConfig,
    x_MD: torch.Tensor,
    taken_MK: torch.Tensor,
    error: float | torch.Tensor,
    ids_M: torch.Tensor | None = None,
) -> Choices:
    """Compare the experts taken with those the router would choose.

    A choice is a near tie if it would be the router's own, had every logit moved by no more than rounding can move it:
    an error of relative size ``error`` in x, in a direction that has nothing to do with a router row w, moves the logit
    by about ``error * |x| * |w| / sqrt(D)``. Of experts that a table names, no other choice is right.

    Args:
        router: the reference's.
        config: the model.
        x_MD: the reference's router input.
        taken_MK: the graph's choice.
        error: largest relative error of x that the limits allow, one or [M].
        ids_M: token ids, for a router that goes by them.
    """
    if taken_MK.shape[-1] != config.experts_per_token:
        return Choices(0, (f"{taken_MK.shape[-1]} experts taken for a token, not {config.experts_per_token}",))
    own_MK = router(x_MD, ids_M)[1]
    differ = (taken_MK.sort(-1).values != own_MK.sort(-1).values).any(-1).nonzero()[:, 0].tolist()
    if not differ:
        return Choices(0, ())
    logits_ME = router.logits(x_MD)
    scale_M = torch.as_tensor(error).expand(len(x_MD)) / config.hidden_size**0.5
    wrong, evidence = [], []
    for token in differ:
        line = f"token {token}: took experts {sorted(taken_MK[token].tolist())}, the reference takes "
        line += f"{sorted(own_MK[token].tolist())}"
        if router.hashed:
            wrong.append(f"{line} by its table")
            continue
        slack_E = scale_M[token] * x_MD[token].norm() * router.weight.float().norm(dim=-1)
        excess = _excess(config, router, logits_ME[token], slack_E, taken_MK[token])
        if excess <= 0:
            gap = _excess(config, router, logits_ME[token], slack_E * 0, taken_MK[token])
            evidence.append(f"{line}; scores {gap:.2g} apart where rounding explains {gap - excess:.2g}")
        else:
            wrong.append(f"{line}, beyond a near tie by {excess:.2g}")
    return Choices(len(evidence), tuple(wrong), tuple(evidence))


def _excess(
    config: ModelConfig, router: Router, logits_E: torch.Tensor, slack_E: torch.Tensor, taken_K: torch.Tensor
) -> float:
    """By how much the taken experts' best possible scores miss the others' least possible ones; 0 or less is a tie."""
    bias = router.e_score_correction_bias
    low, high = (_order(config, logits_E + sign * slack_E) + bias for sign in (-1, 1))
    taken = torch.zeros_like(logits_E, dtype=torch.bool).index_fill(0, taken_K, True)
    groups = config.num_groups if config.topk_method != "greedy" else 1
    open_groups = taken.view(groups, -1).any(-1)
    group_miss = -math.inf
    if groups > config.topk_groups:
        size = 1 if config.topk_method == "group_limited_greedy" else 2
        group_low, group_high = (s.view(groups, -1).topk(size).values.sum(-1) for s in (low, high))
        threshold = group_low.topk(config.topk_groups).values[-1]
        group_miss = float((threshold - group_high[open_groups]).max())
        # A group that nothing was taken from is open all the same, if too few others can possibly be better.
        better = (group_high[None, :] >= group_low[:, None]).sum(-1) - 1  # less itself
        open_groups = open_groups | (better < config.topk_groups)
    rivals = ~taken & open_groups.repeat_interleave(len(taken) // groups)
    if not rivals.any():
        return group_miss
    return max(group_miss, float(low[rivals].max() - high[taken].min()))


def _order(config: ModelConfig, logits_E: torch.Tensor) -> torch.Tensor:
    """What the choice goes by, up to a monotone function of all of it: softmax, which has no bias, keeps the order."""
    return logits_E if config.scoring == "softmax" else expert_scores(logits_E, config.scoring)
