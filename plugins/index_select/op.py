"""index_select: which cached tokens, or entries, each query attends to."""

from __future__ import annotations

import torch

#: The score of what a query cannot see.
LOWEST = torch.finfo(torch.float32).min


@torch.library.custom_op("v4::index_select", mutates_args=())
def index_select(
    q_MHI: torch.Tensor,
    weights_MH: torch.Tensor,
    new_BUI: torch.Tensor,
    cache_BCI: torch.Tensor,
    position_B: torch.Tensor,
    top_k: int,
    ratio: int,
    scale: float,
) -> torch.Tensor:
    """The best K of what a query can see by ``scale * sum_h w_h relu(q_h . k)`` (arXiv 2512.02556, eq. 1 and 2).

    Key n stands for tokens ``ratio*n .. ratio*(n+1) - 1`` and is seen by a query at or after the last of them. Equal
    scores, of which relu makes many, are settled in favour of the lower number.

    Args:
        q_MHI: queries [M, H, I].
        weights_MH: float32.
        new_BUI: keys that the step may complete, the first being number ``position // ratio``.
        cache_BCI: keys held, by number; those from ``position // ratio`` on are ignored.
        position_B: tokens already held by each sequence.
        top_k: most that a query attends to.
        ratio: tokens that a key stands for.
        scale: factor on the scores.

    Returns:
        int64 [M, min(top_k, C + U)]: numbers by falling score, -1 where a query can see fewer.
    """
    score_MN, number_MN = index_scores(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, ratio, scale)
    return best_numbers(score_MN, number_MN, top_k)


def best_numbers(score_MN: torch.Tensor, number_MN: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many numbers [M, K] by falling score, of equal ones the first in order; -1 for the lowest float."""
    best = torch.sort(score_MN, stable=True, dim=-1, descending=True)
    picked = number_MN.gather(-1, best.indices[:, :most])
    return picked.masked_fill(best.values[:, :most] == LOWEST, -1)


def index_scores(
    q_MHI: torch.Tensor,
    weights_MH: torch.Tensor,
    new_BUI: torch.Tensor,
    cache_BCI: torch.Tensor,
    position_B: torch.Tensor,
    ratio: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every key's score, the lowest float where a query cannot see it, and every key's number: both [M, C + U]."""
    (B, C, _), U = cache_BCI.shape, new_BUI.shape[1]
    S = q_MHI.shape[0] // B
    held_B1 = position_B[:, None] // ratio
    number_BN = torch.cat([torch.arange(C).expand(B, C), held_B1 + torch.arange(U)], 1)
    is_there = torch.cat([torch.arange(C) < held_B1, torch.ones(B, U, dtype=torch.bool)], 1)
    visible_BS = (position_B[:, None] + torch.arange(S) + 1) // ratio
    seen_BSN = is_there[:, None] & (number_BN[:, None] < visible_BS[..., None])
    keys_BNI = torch.cat([cache_BCI, new_BUI], 1).float()
    q_BSHI = q_MHI.view(B, S, *q_MHI.shape[1:]).float()
    score_BSHN = torch.einsum("bshi,bni->bshn", q_BSHI, keys_BNI).relu()
    score_BSN = torch.einsum("bshn,bsh->bsn", score_BSHN, weights_MH.view(B, S, -1)) * scale
    numbers = number_BN[:, None].expand(B, S, -1)
    return score_BSN.masked_fill(~seen_BSN, LOWEST).flatten(0, 1), numbers.flatten(0, 1)


@index_select.register_fake
def _(q_MHI, weights_MH, new_BUI, cache_BCI, position_B, top_k, ratio, scale):  # type: ignore[no-untyped-def]
    K = torch.sym_min(top_k, cache_BCI.shape[1] + new_BUI.shape[1])
    return q_MHI.new_empty((q_MHI.shape[0], K), dtype=torch.int64)
