"""Whether tokens or entries that the graph selected and the reference did not are a near tie, or wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


class Indexed(NamedTuple):
    """What an indexer scored, for one sequence from its beginning.

    Attributes:
        scored: the arguments of ``index_select``.
        among: blocks [M, B] that selections are confined to, -1 for none; None where they are not.
        kept: most blocks that are kept for other layers.
        block_size: keys of a block.
    """

    scored: tuple[Any, ...]
    among: torch.Tensor | None = None
    kept: int = 0
    block_size: int = 0

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...]) -> Indexed:
        """From the name and the arguments of the op that selected."""
        if name == "index_reselect":
            *keys, among, position_B, top_k, ratio, scale, block_size = args
            return cls((*keys, position_B, top_k, ratio, scale), among, 0, block_size)
        return cls(args[:8], None, *args[8:])


class _Ranked(NamedTuple):
    """What there is to choose from: scores [M, N], which of them a token sees, and how far each may be off."""

    scores_MN: torch.Tensor
    visible_MN: torch.Tensor
    slack: Callable[[int], torch.Tensor]


def compare_selections(indexed: Indexed, taken_MK: torch.Tensor, errors: IndexErrors) -> Choices:
    """Compare what the graph selected for each token with what the reference would.

    Both are sets. Where they differ, it is a near tie if everything that only the graph selected can score as high as
    everything that only the reference selected, had each score moved by no more than rounding can move it. ReLU makes
    many scores exactly 0; between equals the order of numbers decides, and not every runtime has the same.

    Args:
        indexed: the reference's.
        taken_MK: what the graph selected, -1 for none.
        errors: of what the scores are computed from.
    """
    return _compare(_keys(indexed, errors), taken_MK, indexed.scored[5], "selected")


def compare_candidates(indexed: Indexed, taken_MB: torch.Tensor, errors: IndexErrors) -> Choices:
    """The same of the blocks that were kept: a block scores as its best key does, and the newest one above all."""
    keys, size = _keys(indexed, errors), indexed.block_size
    count = -(-keys.scores_MN.shape[1] // size)
    padding = (0, count * size - keys.scores_MN.shape[1])
    padded = torch.nn.functional.pad(keys.scores_MN, padding, value=_HIDDEN)
    best = padded.unflatten(-1, (count, size)).max(-1)
    seen_M = keys.visible_MN.sum(-1)
    newest = torch.arange(count) == ((seen_M - 1) // size)[:, None]
    scores_MB = best.values.masked_fill(newest & (seen_M > 0)[:, None], torch.inf)

    def slack(token: int) -> torch.Tensor:
        own = torch.nn.functional.pad(keys.slack(token), padding).unflatten(-1, (count, size))
        return own.gather(-1, best.indices[token][:, None])[:, 0]

    found = _compare(_Ranked(scores_MB, scores_MB != _HIDDEN, slack), taken_MB, indexed.kept, "kept blocks")
    return replace(found, selective=0)  # a figure of selections


def _keys(indexed: Indexed, errors: IndexErrors) -> _Ranked:
    q_MHI, weights_MH, new_BUI, cache_BCI, position_B, _, ratio, scale = indexed.scored
    scores_MN, number_MN = index_scores(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, ratio, scale)
    keys_NI, order = torch.cat([cache_BCI, new_BUI], 1)[0].float(), number_MN[0].argsort()
    scores_MN, keys_NI = scores_MN[:, order], keys_NI[order]  # from here on, a key's number is its index
    if indexed.among is not None:
        block_N = torch.arange(scores_MN.shape[1]) // indexed.block_size
        inside_MN = (indexed.among[:, :, None] == block_N).any(1)
        scores_MN = scores_MN.masked_fill(~inside_MN, _HIDDEN)
    return _Ranked(
        scores_MN,
        scores_MN != _HIDDEN,
        lambda token: _slack(q_MHI[token], weights_MH[token], keys_NI, scale, errors),
    )


def _compare(ranked: _Ranked, taken_MK: torch.Tensor, most: int, did: str) -> Choices:
    scores_MN, visible_MN = ranked.scores_MN, ranked.visible_MN
    seen_M = visible_MN.sum(-1)
    own_MN = _among_the_best(scores_MN, most) & visible_MN
    taken_MN, faults = _as_sets(taken_MK, visible_MN)
    count_M = seen_M.clamp(max=most)
    wrong: list[str] = []
    evidence: list[str] = []
    for token in (taken_MN != own_MN).any(-1).logical_or(faults).nonzero()[:, 0].tolist():
        taken, own, score = taken_MN[token], own_MN[token], scores_MN[token]
        selected = taken_MK[token][taken_MK[token] >= 0].tolist()
        if faults[token] or len(selected) != int(count_M[token]):
            wrong.append(
                f"token {token}: {did} {numbers(selected)} where {int(count_M[token])} of the "
                f"{int(seen_M[token])} that it can see were to be"
            )
            continue
        slack = ranked.slack(token)
        only, missed = (taken & ~own).nonzero()[:, 0], (own & ~taken).nonzero()[:, 0]
        gaps = score[missed][:, None] - score[only]
        explained = torch.hypot(slack[missed][:, None], slack[only])
        worst = int((gaps - explained).argmax())
        gap, reach = float(gaps.flatten()[worst]), float(explained.flatten()[worst])
        seen = score[visible_MN[token]]
        last = score[own].min()
        line = (
            f"token {token}: {did} {numbers(only.tolist())}, the reference {numbers(missed.tolist())}; scores "
            f"{_scores(score[only])} and {_scores(score[missed])}, {gap:.2g} apart where rounding explains "
            f"{reach:.2g}; {int((seen == last).sum())} of {len(seen)} equal the last one selected, "
            f"{int((seen == 0).sum())} are exactly 0"
        )
        (evidence if gap <= reach else wrong).append(line)  # a NaN is no near tie
    return Choices(len(evidence), tuple(wrong), tuple(evidence), int((seen_M > most).sum()))


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
