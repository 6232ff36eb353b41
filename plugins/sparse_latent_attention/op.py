"""sparse_latent_attention: attention of absorbed queries over selected rows of the latent cache."""

from __future__ import annotations

import torch

from v4export.plugins.segments import attend
from v4export.plugins.sparse_attention.op import selected_rows


@torch.library.custom_op("v4::sparse_latent_attention", mutates_args=())
def sparse_latent_attention(
    q_MHW: torch.Tensor,
    new_BSW: torch.Tensor,
    cache_BTW: torch.Tensor,
    selected_MK: torch.Tensor,
    position_B: torch.Tensor,
    latent_width: int,
    scale: float,
) -> torch.Tensor:
    """``latent_attention`` over the tokens that an indexer selected (DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

    Args:
        q_MHW: absorbed queries, [B*S, H, W] with W = L + R.
        new_BSW: rows of the new tokens, [B, S, W].
        cache_BTW: rows held so far, by position. The portable body needs T >= 1: a row that is ignored where none is
            held.
        selected_MK: positions of the tokens that each query attends to, int64 [B*S, K], none of them twice; -1 is none.
            Every query needs one at least.
        position_B: tokens already held by each sequence, int64 [B].
        latent_width: L.
        scale: factor on the scores.

    Returns:
        z_MHL: weighted latents, [B*S, H, L], in q's dtype.
    """
    B, S, W = new_BSW.shape
    rows, chosen = selected_rows(selected_MK, new_BSW, cache_BTW, position_B)
    return attend(q_MHW.view(B, S, -1, W), rows, chosen, scale, value_width=latent_width)


@sparse_latent_attention.register_fake
def _(q_MHW, new_BSW, cache_BTW, selected_MK, position_B, latent_width, scale):  # type: ignore[no-untyped-def]
    return q_MHW.new_empty((q_MHW.shape[0], q_MHW.shape[1], latent_width))
