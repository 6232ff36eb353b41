"""moe_route: which K of E experts each token takes, and with what weight."""

from __future__ import annotations

import torch

#: How a group of experts is scored when only the best groups may be chosen from.
GROUP_SCORES = ("top2_sum", "max")


#: How logits become scores: over all experts (V2), of each by itself (V3), and the same with no upper bound (V4).
SCORINGS = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def expert_scores(logits_ME: torch.Tensor, scoring: str) -> torch.Tensor:
    """Scores float32 [M, E]; none is negative."""
    return SCORINGS[scoring](logits_ME)


@torch.library.custom_op("v4::moe_route", mutates_args=())
def moe_route(
    logits_ME: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    scoring: str,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    norm: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts (DeepSeek-V3, arXiv 2412.19437, eq. 13-16; DeepSeek-V2, arXiv 2405.04434, section 2.2.2).

    Args:
        logits_ME: router outputs, float32 [M, E].
        bias_E: correction added for the choice alone, never for the weight, float32 [E]; zeros where there is none.
        top_k: K.
        scoring: a key of ``SCORINGS``.
        num_groups: G; experts are G runs of E/G neighbours.
        topk_groups: how many groups may be chosen from.
        group_score: ``top2_sum`` (V3) or ``max`` (V2).
        norm: divide the K weights by their sum.
        scale: factor on the weights.

    Returns:
        weights float32 [M, K] and expert indices int64 [M, K], by falling score.
    """
    scores_ME = expert_scores(logits_ME, scoring)
    choice_ME = scores_ME + bias_E
    if topk_groups < num_groups:
        grouped = choice_ME.unflatten(-1, (num_groups, -1))
        group_MG = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        chosen = group_MG.topk(topk_groups, dim=-1).indices
        closed_MG = torch.ones_like(group_MG, dtype=torch.bool).scatter(-1, chosen, False)
        choice_ME = grouped.masked_fill(closed_MG[..., None], float("-inf")).flatten(-2)
    idx_MK = choice_ME.topk(top_k, dim=-1).indices
    return expert_weights(scores_ME, idx_MK, norm, scale), idx_MK


def expert_weights(scores_ME: torch.Tensor, idx_MK: torch.Tensor, norm: bool, scale: float) -> torch.Tensor:
    """Weights float32 [M, K] of chosen experts."""
    w_MK = scores_ME.gather(-1, idx_MK)
    if norm:
        w_MK = w_MK / (w_MK.sum(-1, keepdim=True) + 1e-20)
    return w_MK * scale


@moe_route.register_fake
def _(logits_ME, bias_E, top_k, scoring, num_groups, topk_groups, group_score, norm, scale):  # type: ignore[no-untyped-def]
    shape = (logits_ME.shape[0], top_k)
    return logits_ME.new_empty(shape), logits_ME.new_empty(shape, dtype=torch.int64)
