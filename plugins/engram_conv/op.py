"""engram_conv: a short causal convolution of every channel with itself."""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::engram_conv", mutates_args=())
def engram_conv(
    rows_BSP: torch.Tensor,
    ring_BRP: torch.Tensor,
    weight_PK: torch.Tensor,
    position_B: torch.Tensor,
    dilation: int,
) -> torch.Tensor:
    """``out_t = silu(sum_j weight[K-1-j] * x_{t - j*dilation})``, j < K, channel by channel (arXiv 2601.07372, 2.3).

    Tokens before the first contribute nothing. All of it is float32.

    Args:
        rows_BSP: of the new tokens; P = X*D channels, all streams of a token.
        ring_BRP: rows of earlier tokens, R = (K-1)*dilation of them, token t at ``t % R``.
        weight_PK: the last tap is the token's own.
        position_B: tokens already held by each sequence.
        dilation: tokens between taps.

    Returns:
        [B, S, P] in the rows' dtype.
    """
    B, R, _ = ring_BRP.shape
    token_BR = position_B[:, None] - R + torch.arange(R)
    past_BRP = ring_BRP.float()[torch.arange(B)[:, None], token_BR % R].masked_fill(token_BR[..., None] < 0, 0)
    taps_BSPK = torch.cat([past_BRP, rows_BSP.float()], 1).unfold(1, R + 1, 1)[..., ::dilation]
    return torch.nn.functional.silu((taps_BSPK * weight_PK.float()).sum(-1)).to(rows_BSP.dtype)


@engram_conv.register_fake
def _(rows_BSP, ring_BRP, weight_PK, position_B, dilation):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows_BSP)
