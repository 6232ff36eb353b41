"""hyper_coefficients: what hyper_connection computes of a token's streams, before it collapses them."""

from __future__ import annotations

import torch

from v4export.plugins.hyper_connection.op import coefficients


@torch.library.custom_op("v4::hyper_coefficients", mutates_args=())
def hyper_coefficients(
    streams_MXD: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shares and the matrix of ``hyper_connection``, whose arguments these are (arXiv 2512.24880, section 4.2).

    For DeepSeek-V4.1's hyper-connections, where a half collapses its streams by the shares of the half before it.

    Args:
        streams_MXD: [M, X, D].
        fn: float32 [(2+X)*X, X*D].
        base: float32 [(2+X)*X].
        scale: float32 [3].
        iterations: of Sinkhorn and Knopp, the first included.
        eps: added to the shares of the collapse, to the softmax, and to every sum that is divided by.
        norm_eps: of the norm.

    Returns:
        pre_MX, the shares of the collapse, post_MX and comb_MXX, all float32.
    """
    return coefficients(streams_MXD, fn, base, scale, iterations, eps, norm_eps)


@hyper_coefficients.register_fake
def _(streams_MXD, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    M, X, _ = streams_MXD.shape
    pre_MX, post_MX, comb_MXX = (streams_MXD.new_empty(s, dtype=torch.float32) for s in ((M, X), (M, X), (M, X, X)))
    return pre_MX, post_MX, comb_MXX
