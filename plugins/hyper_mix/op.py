"""hyper_mix: a sublayer's output joined to the streams that passed it by."""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::hyper_mix", mutates_args=())
def hyper_mix(
    streams_MXD: torch.Tensor, y_MD: torch.Tensor, post_MX: torch.Tensor, comb_MXX: torch.Tensor
) -> torch.Tensor:
    """``stream'_k = post_k y + sum_j comb[j, k] stream_j`` in float32 (arXiv 2512.24880, section 4.2).

    Args:
        streams_MXD: [M, X, D].
        y_MD: [M, D].
        post_MX: float32.
        comb_MXX: float32; summed over its first X.

    Returns:
        [M, X, D] in the streams' dtype.
    """
    mixed = comb_MXX.mT @ streams_MXD.float()
    return (post_MX[..., None] * y_MD.float()[:, None] + mixed).to(streams_MXD.dtype)


@hyper_mix.register_fake
def _(streams_MXD, y_MD, post_MX, comb_MXX):  # type: ignore[no-untyped-def]
    return torch.empty_like(streams_MXD)
