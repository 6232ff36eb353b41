"""Eager attention over rows that stand in several segments, some of them hidden from some queries."""

from __future__ import annotations

import torch


def attend(
    q_BSHW: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    sinks_H: torch.Tensor | None = None,
    value_width: int | None = None,
) -> torch.Tensor:
    """Softmax attention in float32 with keys that are their own values.

    Args:
        q_BSHW: queries.
        keys: [B, N, W], or [B, S, N, W] where every query has its own.
        visible: bool [B, S, N].
        scale: factor on the scores.
        sinks_H: for each head a score that has no value.
        value_width: how many of a key's channels are its value; all unless given.

    Returns:
        [B*S, H, W] in q's dtype.
    """
    each = keys.float() if keys.dim() == 4 else keys.float()[:, None]
    score = (q_BSHW.float() * scale) @ each.mT
    score = score.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks_H is not None:
        sink = sinks_H.float()[:, None].expand(*score.shape[:-1], 1)
        score = torch.cat([score, sink], -1)
    p = score.softmax(-1)[..., : keys.shape[-2]]
    return (p @ each[..., :value_width]).flatten(0, 1).to(q_BSHW.dtype)


def window_visible(position_B: torch.Tensor, S: int, R: int, since_B: torch.Tensor | None = None) -> torch.Tensor:
    """Which rows of a ring of R, and which of S new rows, each query sees: bool [B, S, R + S].

    A query sees the R newest tokens, itself included; token t is in the ring at ``t % R``. Of tokens before ``since``
    there are no rows.
    """
    at_BS = position_B[:, None] + torch.arange(S)
    slot = torch.arange(R)
    newest = position_B[:, None] - 1
    token_BR = newest - (newest - slot) % R
    first_B = torch.zeros_like(position_B) if since_B is None else since_B
    ring = (token_BR >= first_B[:, None])[:, None] & (token_BR[:, None] > at_BS[..., None] - R)
    age = torch.arange(S)[:, None] - torch.arange(S)
    new = ((age >= 0) & (age < R)).expand(len(position_B), S, S)
    return torch.cat([ring, new], -1)


def entries_visible(position_B: torch.Tensor, S: int, C: int, U: int, ratio: int) -> torch.Tensor:
    """Which of C held and U new entries each query sees, those completed by its own token or before: [B, S, C + U]."""
    held_B1 = position_B[:, None] // ratio
    visible_BS1 = ((position_B[:, None] + torch.arange(S) + 1) // ratio)[..., None]
    held = (torch.arange(C) < held_B1)[:, None].expand(-1, S, C)
    return torch.cat([held, (held_B1 + torch.arange(U))[:, None] < visible_BS1], -1)
