"""hyper_connection: from a token's streams, a sublayer's input and how its output will be joined to them."""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::hyper_connection", mutates_args=())
def hyper_connection(
    streams_MXD: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Manifold-constrained hyper-connections, the half before a sublayer (arXiv 2512.24880, section 4.2).

    Of the streams, flattened and normed, ``fn`` makes X + X + X*X numbers: after scale, base and a sigmoid, the shares
    of the collapse and of the output; and a matrix that Sinkhorn's iterations make doubly stochastic. Its first
    iteration is a softmax of the rows and a division of the columns by their sums. All of it is float32.

    Args:
        streams_MXD: [M, X, D].
        fn: float32 [(2+X)*X, X*D].
        base: float32 [(2+X)*X].
        scale: float32 [3], one for each of the three.
        iterations: of Sinkhorn and Knopp, the first included.
        eps: added to the shares of the collapse, to the softmax, and to every sum that is divided by.
        norm_eps: of the norm.

    Returns:
        z_MD: sum_j pre_j stream_j, in the streams' dtype; post_MX and comb_MXX, float32.
    """
    pre_MX, post_MX, comb_MXX = coefficients(streams_MXD, fn, base, scale, iterations, eps, norm_eps)
    z_MD = (pre_MX[..., None] * streams_MXD.float()).sum(1).to(streams_MXD.dtype)
    return z_MD, post_MX, comb_MXX


def coefficients(
    streams_MXD: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shares of the collapse and of the output [M, X], and the matrix [M, X, X], all float32."""
    M, X, _ = streams_MXD.shape
    flat = streams_MXD.float().flatten(1)
    mixes = (flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)) @ fn.T
    pre, post, comb = mixes.split([X, X, X * X], -1)
    pre_b, post_b, comb_b = base.split([X, X, X * X])
    pre_MX = torch.sigmoid(pre * scale[0] + pre_b) + eps
    post_MX = 2 * torch.sigmoid(post * scale[1] + post_b)
    comb_MXX = (comb * scale[2] + comb_b).view(M, X, X).softmax(-1) + eps
    comb_MXX = comb_MXX / (comb_MXX.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb_MXX = comb_MXX / (comb_MXX.sum(-1, keepdim=True) + eps)
        comb_MXX = comb_MXX / (comb_MXX.sum(-2, keepdim=True) + eps)
    return pre_MX, post_MX, comb_MXX


@hyper_connection.register_fake
def _(streams_MXD, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    M, X, D = streams_MXD.shape
    post_MX, comb_MXX = (streams_MXD.new_empty(shape, dtype=torch.float32) for shape in ((M, X), (M, X, X)))
    return streams_MXD.new_empty((M, D)), post_MX, comb_MXX
