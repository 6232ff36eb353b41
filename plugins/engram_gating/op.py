"""engram_gating: what Engram looked up, weighted for each stream by how well it fits there."""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::engram_gating", mutates_args=())
def engram_gating(
    streams_MXD: torch.Tensor,
    keys_MXD: torch.Tensor,
    value_MD: torch.Tensor,
    q_weight_XD: torch.Tensor,
    k_weight_XD: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """``u_m = sigmoid(s_m) value`` for each stream m in float32 (Engram, arXiv 2601.07372, section 2.3).

    ``s`` is the root of ``|g|`` with the sign of ``g = norm(stream, q_weight) . norm(key, k_weight) / sqrt(D)``, where
    ``|g|`` is at least 1e-6 and 0 counts as positive. The root is in the authors' code and not in the paper's formula.

    Args:
        streams_MXD: [M, X, D].
        keys_MXD: the same token's row, projected once for each stream.
        value_MD: the row projected to a value, which the streams share.
        q_weight_XD: of the streams' norms.
        k_weight_XD: of the keys' norms.
        eps: of the norms; as little as 1e-20.

    Returns:
        u_MXD: in the streams' dtype.
    """
    wide = streams_MXD.float(), keys_MXD.float()
    stream_rms, key_rms = ((x.square().mean(-1) + eps).sqrt() for x in wide)
    dot_MX = (wide[0] * (q_weight_XD.float() * k_weight_XD.float()) * wide[1]).mean(-1)
    g_MX = dot_MX * streams_MXD.shape[-1] ** 0.5 / (stream_rms * key_rms)
    root_MX = g_MX.abs().clamp(min=1e-6).sqrt()
    s_MX = torch.where(g_MX < 0, -root_MX, root_MX)
    return (s_MX.sigmoid()[..., None] * value_MD.float()[:, None]).to(streams_MXD.dtype)


@engram_gating.register_fake
def _(streams_MXD, keys_MXD, value_MD, q_weight_XD, k_weight_XD, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(streams_MXD)
