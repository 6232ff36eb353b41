"""sparse_attention: attention to the newest tokens and to selected compressed entries."""

from __future__ import annotations

import torch

from v4export.plugins.segments import attend, window_visible


@torch.library.custom_op("v4::sparse_attention", mutates_args=())
def sparse_attention(
    q_MHW: torch.Tensor,
    new_BSW: torch.Tensor,
    ring_BRW: torch.Tensor,
    new_entry_BUW: torch.Tensor,
    entry_BCW: torch.Tensor,
    selected_MK: torch.Tensor,
    position_B: torch.Tensor,
    sinks_H: torch.Tensor,
    ratio: int,
    scale: float,
    since_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """``window_attention`` whose softmax also runs over selected entries (DeepSeek-V4, arXiv 2606.19348, 2.3.1).

    Args:
        q_MHW: queries [B*S, H, W].
        new_BSW: rows of the new tokens.
        ring_BRW: rows held; token t at ``t % R``.
        new_entry_BUW: entries that the step may complete, the first being number ``position // ratio``.
        entry_BCW: entries held, by number. The portable body needs C >= 1: a row that is ignored where none is held.
        selected_MK: numbers of the entries that each query attends to, int64 [B*S, K], none of them twice; -1 is none.
        position_B: tokens already held by each sequence, int64 [B].
        sinks_H: float32.
        ratio: tokens that an entry stands for.
        scale: factor on the scores.
        since_B: first token of each sequence that there is a row of, at most ``position``; int64, 0 unless given.

    Returns:
        z_MHW: [B*S, H, W] in q's dtype.
    """
    B, S, W = new_BSW.shape
    R = ring_BRW.shape[1]
    entries, chosen = selected_rows(selected_MK, new_entry_BUW, entry_BCW, position_B // ratio)
    keys = torch.cat([ring_BRW, new_BSW], 1)[:, None].expand(B, S, R + S, W)
    visible = torch.cat([window_visible(position_B, S, R, since_B), chosen], -1)
    return attend(q_MHW.view(B, S, -1, W), torch.cat([keys, entries], 2), visible, scale, sinks_H)


def selected_rows(
    selected_MK: torch.Tensor, new_BUW: torch.Tensor, cache_BCW: torch.Tensor, held_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [B, S, K, W] of these numbers, and which of them there are, bool [B, S, K]."""
    (B, C, _), U = cache_BCW.shape, new_BUW.shape[1]
    number_BSK = selected_MK.view(B, -1, selected_MK.shape[-1])
    held = held_B[:, None, None]
    at = torch.where(number_BSK < held, number_BSK.clamp(min=0), C + (number_BSK - held).clamp(max=U - 1))
    rows = torch.cat([cache_BCW, new_BUW], 1)
    return rows[torch.arange(B)[:, None, None], at], number_BSK >= 0


@sparse_attention.register_fake
def _(q_MHW, new_BSW, ring_BRW, new_entry_BUW, entry_BCW, selected_MK, position_B, sinks_H, ratio, scale, since_B=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(q_MHW)
