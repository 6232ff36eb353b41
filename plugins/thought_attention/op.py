"""thought_attention: attention of a thought's step over a sequence's latent rows and the thought's own."""

from __future__ import annotations

import torch

from v4export.plugins.segments import attend


@torch.library.custom_op("v4::thought_attention", mutates_args=())
def thought_attention(
    q_MHW: torch.Tensor,
    own_MPW: torch.Tensor,
    cache_BTW: torch.Tensor,
    thought_at_BQ: torch.Tensor,
    latent_width: int,
    scale: float,
) -> torch.Tensor:
    """``latent_attention`` of thoughts at several positions in parallel (Quiet-STaR, arXiv 2403.09629, section 4.2).

    A thought sees the tokens of its sequence up to the one it is about, and its own earlier steps: of another thought
    it sees nothing, which is the diagonal mask of that paper.

    Args:
        q_MHW: absorbed queries, [B*Q, H, W] with W = L + R.
        own_MPW: rows of each thought's steps, this one's last, [B*Q, P, W]; P is 1 or more.
        cache_BTW: rows of the sequence's tokens, [B, T, W]; row j is the token at position j.
        thought_at_BQ: the token that each thought is about, int64 [B, Q], below T.
        latent_width: L.
        scale: factor on the scores.

    Returns:
        z_MHL: weighted latents, [B*Q, H, L], in q's dtype.
    """
    (B, Q), (_, H, W) = thought_at_BQ.shape, q_MHW.shape
    T, P = cache_BTW.shape[1], own_MPW.shape[1]
    shared_BQTW = cache_BTW[:, None].expand(B, Q, T, W)
    rows_BQNW = torch.cat([shared_BQTW, own_MPW.reshape(B, Q, P, W)], 2)
    held = torch.arange(T, device=cache_BTW.device) <= thought_at_BQ[..., None]
    visible = torch.cat([held, held.new_ones(B, Q, P)], -1)
    return attend(q_MHW.reshape(B, Q, H, W), rows_BQNW, visible, scale, value_width=latent_width)


@thought_attention.register_fake
def _(q_MHW, own_MPW, cache_BTW, thought_at_BQ, latent_width, scale):  # type: ignore[no-untyped-def]
    return q_MHW.new_empty((q_MHW.shape[0], q_MHW.shape[1], latent_width))
