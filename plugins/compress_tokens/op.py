"""compress_tokens: the entries that a step's tokens may complete, pooled from their rows and from those kept before."""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::compress_tokens", mutates_args=())
def compress_tokens(
    rows_BSP: torch.Tensor,
    ring_BRP: torch.Tensor,
    bias: torch.Tensor,
    position_B: torch.Tensor,
    ratio: int,
    halves: int,
) -> torch.Tensor:
    """``entry = sum_t softmax_t(gate_t + bias_t) * key_t``, channel by channel (arXiv 2606.19348, sections 2.3.1-2).

    Entry e stands for tokens ``ratio*e .. ratio*(e+1) - 1``. With two halves it is pooled from twice as many: from the
    first halves of the rows of entry e-1's tokens, and the second halves of its own; entry 0 has only its own.

    Args:
        rows_BSP: projections [key | gate] of the new tokens, float32 [B, S, 2*halves*W].
        ring_BRP: the same of earlier tokens, R = halves*ratio of them, token t at ``t % R``.
        bias: of the gates by place in an entry, float32 [ratio, halves*W].
        position_B: tokens already held by each sequence.
        ratio: tokens of an entry.
        halves: 1 or 2.

    Returns:
        float32 [B, ceil(S/ratio), W]: entries ``position // ratio`` and following. What the step does not complete is
        pooled from the tokens there are, and to be dropped.
    """
    B, S, P = rows_BSP.shape
    W, R = P // (2 * halves), halves * ratio
    entry_BU = position_B[:, None] // ratio + torch.arange(-(-S // ratio))
    slot = torch.arange(R)
    token_BUR = (entry_BU[..., None] + slot // ratio - (halves - 1)) * ratio + slot % ratio
    start = position_B[:, None, None]
    exists = (token_BUR >= 0) & (token_BUR < start + S)
    row_BUR = torch.where(token_BUR < start, token_BUR % R, R + (token_BUR - start).clamp(max=S - 1))
    every = torch.cat([ring_BRP, rows_BSP], 1).view(B, R + S, 2, halves, W)
    picked = every[torch.arange(B)[:, None, None], row_BUR, :, slot // ratio]  # [B, U, R, 2, W]
    bias_RW = bias.view(ratio, halves, W)[slot % ratio, slot // ratio]
    gate = (picked[..., 1, :] + bias_RW).masked_fill(~exists[..., None], torch.finfo(torch.float32).min)
    return (gate.softmax(2) * picked[..., 0, :]).sum(2)


@compress_tokens.register_fake
def _(rows_BSP, ring_BRP, bias, position_B, ratio, halves):  # type: ignore[no-untyped-def]
    B, S, P = rows_BSP.shape
    return rows_BSP.new_empty((B, (S + ratio - 1) // ratio, P // (2 * halves)))
