"""window_attention: attention to the newest tokens, with a sink."""

from __future__ import annotations

import torch

from v4export.plugins.segments import attend, window_visible


@torch.library.custom_op("v4::window_attention", mutates_args=())
def window_attention(
    q_MHW: torch.Tensor,
    new_BSW: torch.Tensor,
    ring_BRW: torch.Tensor,
    position_B: torch.Tensor,
    sinks_H: torch.Tensor,
    scale: float,
    since_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every query sees the R newest tokens, itself included (DeepSeek-V4, arXiv 2606.19348, section 2.3).

    ``z = sum_t p_t row_t`` with ``p = softmax(scale * q . row)``, in whose denominator the sink counts as one score
    more. All sums are float32.

    Args:
        q_MHW: queries [B*S, H, W].
        new_BSW: rows of the new tokens, keys and values at once.
        ring_BRW: rows held; token t at ``t % R``, slots that no token is in yet are ignored.
        position_B: tokens already held by each sequence, int64 [B].
        sinks_H: float32.
        scale: factor on the scores.
        since_B: first token of each sequence that there is a row of, at most ``position``; int64, 0 unless given.

    Returns:
        z_MHW: [B*S, H, W] in q's dtype.
    """
    B, S, W = new_BSW.shape
    keys, visible = torch.cat([ring_BRW, new_BSW], 1), window_visible(position_B, S, ring_BRW.shape[1], since_B)
    return attend(q_MHW.view(B, S, -1, W), keys, visible, scale, sinks_H)


@window_attention.register_fake
def _(q_MHW, new_BSW, ring_BRW, position_B, sinks_H, scale, since_B=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(q_MHW)
