"""Whether tokens or entries that the graph selected and the reference did not are a near tie, or wrong."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from v4export.plugins.index_select.op import index_scores
from v4export.verify.routing import Choices, numbers

#: What a key that a query cannot see scores.
_HIDDEN = torch.finfo(torch.float32).min


class IndexErrors(NamedTuple):
    """Relative errors that the limits allow: of an index query, of a key, and of a head's weight."""

    query: float
    key: float
    weight: float


def compare_selections(index: tuple[Any, ...], taken_MK: torch.Tensor, errors: IndexErrors) -> Choices:
    """Compare what the graph selected for each token with what the reference would.

    Both are sets. Where they differ, it is a near tie if everything that only the graph selected can score as high as
    everything that only the reference selected, had each score moved by no more than rounding can move it. ReLU makes
    many scores exactly 0; between equals the order of numbers decides, and not every runtime has the same.

    Args:
        index: the arguments of the reference's ``index_select``, for one sequence from its beginning.
        taken_MK: what the graph selected, -1 for none.
        errors: of what the scores are computed from.
    """
    q_MHI, weights_MH, new_BUI, cache_BCI, position_B, top_k, ratio, scale = index
    scores_MN, number_MN = index_scores(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, ratio, scale)
    keys_NI, order = torch.cat([cache_BCI, new_BUI], 1)[0].float(), number_MN[0].argsort()
    scores_MN, keys_NI = scores_MN[:, order], keys_NI[order]  # from here on, a key's number is its index
    visible_MN = scores_MN != _HIDDEN
    seen_M = visible_MN.sum(-1)
    own_MN = _among_the_best(scores_MN, top_k) & visible_MN
    taken_MN, faults = _as_sets(taken_MK, visible_MN)
    count_M = seen_M.clamp(max=top_k)
    wrong: list[str] = []
    evidence: list[str] = []
    for token in (taken_MN != own_MN).any(-1).logical_or(faults).nonzero()[:, 0].tolist():
        taken, own, score = taken_MN[token], own_MN[token], scores_MN[token]
        selected = taken_MK[token][taken_MK[token] >= 0].tolist()
        if faults[token] or len(selected) != int(count_M[token]):
            wrong.append(
                f"token {token}: selected {numbers(selected)} where {int(count_M[token])} of the "
                f"{int(seen_M[token])} that it can see were to be"
            )
            continue
        slack = _slack(q_MHI[token], weights_MH[token], keys_NI, scale, errors)
        only, missed = (taken & ~own).nonzero()[:, 0], (own & ~taken).nonzero()[:, 0]
        gaps = score[missed][:, None] - score[only]
        explained = torch.hypot(slack[missed][:, None], slack[only])
        worst = int((gaps - explained).argmax())
        gap, reach = float(gaps.flatten()[worst]), float(explained.flatten()[worst])
        seen = score[visible_MN[token]]
        last = score[own].min()
        line = (
            f"token {token}: selected {numbers(only.tolist())}, the reference {numbers(missed.tolist())}; scores "
            f"{_scores(score[only])} and {_scores(score[missed])}, {gap:.2g} apart where rounding explains "
            f"{reach:.2g}; {int((seen == last).sum())} of {len(seen)} equal the last one selected, "
            f"{int((seen == 0).sum())} are exactly 0"
        )
        (evidence if gap <= reach else wrong).append(line)  # a NaN is no near tie
    return Choices(len(evidence), tuple(wrong), tuple(evidence), int((seen_M > top_k).sum()))


def _among_the_best(scores_MN: torch.Tensor, top_k: int) -> torch.Tensor:
    """Which keys are selected; of equals the lower number."""
    best = torch.sort(scores_MN, stable=True, dim=-1, descending=True).indices[:, :top_k]
    return torch.zeros_like(scores_MN, dtype=torch.bool).scatter(-1, best, True)


def _as_sets(taken_MK: torch.Tensor, visible_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What was taken, as sets of keys; and tokens that took a key twice, or one that they cannot see."""
    M, N = visible_MN.shape
    inside = (taken_MK >= 0) & (taken_MK < N)
    count = torch.zeros(M, N, dtype=torch.int64).scatter_add(-1, taken_MK.clamp(0, N - 1), inside.long())
    faults = (count > 1).any(-1) | ((count > 0) & ~visible_MN).any(-1) | (taken_MK >= N).any(-1)
    return count > 0, faults


def _slack(
    q_HI: torch.Tensor, weights_H: torch.Tensor, keys_NI: torch.Tensor, scale: float, errors: IndexErrors
) -> torch.Tensor:
    """How far each score of one token may be off, [N].

    An error of relative size e in q, in a direction that has nothing to do with k, moves q . k by e |q| |k| / sqrt(I).
    A head whose product is further below 0 than that does not move the score. Errors of heads are independent. Of the
    weights, which sums produce that may cancel, the error is relative to all of a token's.
    """
    q_HI = q_HI.float()
    size_HN = q_HI.norm(dim=-1)[:, None] * keys_NI.norm(dim=-1)
    product_HN = q_HI @ keys_NI.T
    off_HN = size_HN * ((errors.query**2 + errors.key**2) / q_HI.shape[-1]) ** 0.5
    off_HN = off_HN * (product_HN > -off_HN)
    weight_H = errors.weight * weights_H.square().mean().add(weights_H.square()).sqrt()
    squares = (weights_H[:, None] * off_HN).square() + (weight_H[:, None] * product_HN.relu()).square()
    return squares.sum(0).sqrt() * abs(scale)


def _scores(values: torch.Tensor) -> str:
    return ", ".join(f"{v:.6g}" for v in values[:4].tolist()) + (", .." if len(values) > 4 else "")
