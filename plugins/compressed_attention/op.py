"""compressed_attention: attention to the newest tokens and to every compressed entry."""

from __future__ import annotations

import torch

from v4export.plugins.segments import attend, entries_visible, window_visible


@torch.library.custom_op("v4::compressed_attention", mutates_args=())
def compressed_attention(
    q_MHW: torch.Tensor,
    new_BSW: torch.Tensor,
    ring_BRW: torch.Tensor,
    new_entry_BUW: torch.Tensor,
    entry_BCW: torch.Tensor,
    position_B: torch.Tensor,
    sinks_H: torch.Tensor,
    ratio: int,
    scale: float,
) -> torch.Tensor:
    """``window_attention`` whose softmax also runs over entries (DeepSeek-V4, arXiv 2606.19348, section 2.3.2).

    Args:
        q_MHW: queries [B*S, H, W].
        new_BSW: rows of the new tokens.
        ring_BRW: rows held; token t at ``t % R``.
        new_entry_BUW: entries that the step may complete, the first being number ``position // ratio``.
        entry_BCW: entries held, by number; those from ``position // ratio`` on are ignored.
        position_B: tokens already held by each sequence, int64 [B].
        sinks_H: float32.
        ratio: tokens that an entry stands for. Entry n is seen by queries at or after the last of them.
        scale: factor on the scores.

    Returns:
        z_MHW: [B*S, H, W] in q's dtype.
    """
    B, S, W = new_BSW.shape
    R, C, U = ring_BRW.shape[1], entry_BCW.shape[1], new_entry_BUW.shape[1]
    keys = torch.cat([ring_BRW, new_BSW, entry_BCW, new_entry_BUW], 1)
    seen = [window_visible(position_B, S, R), entries_visible(position_B, S, C, U, ratio)]
    return attend(q_MHW.view(B, S, -1, W), keys, torch.cat(seen, -1), scale, sinks_H)


@compressed_attention.register_fake
def _(q_MHW, new_BSW, ring_BRW, new_entry_BUW, entry_BCW, position_B, sinks_H, ratio, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(q_MHW)
