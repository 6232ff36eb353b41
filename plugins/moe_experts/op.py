"""moe_experts: the SwiGLU experts that tokens chose, weighted and added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from v4export.plugins.block_dequantize.op import block_dequantize

#: Numbers of a row that share a multiplier in packed E2M1.
FP4_BLOCK = 32

#: E2M1 numbers by their four bits (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(gate) * up in float32; with a limit, gate is cut off above it and up beyond it on both sides."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def unpack_fp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, K] of packed E2M1 uint8 [N, K/2], the even column in the low bits, and multipliers [N, K/32]."""
    table = torch.tensor(E2M1)
    pairs = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1)
    return (pairs.flatten(-2) * scale.float().repeat_interleave(FP4_BLOCK, -1)).to(dtype)


@torch.library.custom_op("v4::moe_experts", mutates_args=())
def moe_experts(
    x_MD: torch.Tensor,
    weights_MK: torch.Tensor,
    idx_MK: torch.Tensor,
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    gate_scale: Sequence[torch.Tensor],
    up_scale: Sequence[torch.Tensor],
    down_scale: Sequence[torch.Tensor],
    rows: int,
    columns: int,
    limit: float | None,
) -> torch.Tensor:
    """``y = sum_k w_k * down_k (silu(gate_k x) * (up_k x))``; only chosen experts are computed.

    DeepSeek-V3 (arXiv 2412.19437, eq. 12). SwiGLU's product and the sum over k are float32.

    Args:
        x_MD: tokens [M, D].
        weights_MK: float32 [M, K].
        idx_MK: int64 [M, K].
        gate: E matrices [F, D], in x's dtype or float8_e4m3fn, or [F, D/2] of packed E2M1 in uint8.
        up: E matrices [F, D].
        down: E matrices [D, F].
        gate_scale: E block multipliers where the matrices are FP8 or E2M1, else empty; so for the other two.
        up_scale: as ``gate_scale``.
        down_scale: as ``gate_scale``.
        rows: height of a block.
        columns: width of a block.
        limit: of ``swiglu``.

    Returns:
        [M, D] in x's dtype.
    """

    def matrix(stack: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], e: int) -> torch.Tensor:
        if not scales:
            return stack[e]
        if stack[e].dtype == torch.uint8:
            return unpack_fp4(stack[e], scales[e], x_MD.dtype)
        return block_dequantize(stack[e], scales[e], rows, columns, x_MD.dtype)

    y_MD = torch.zeros_like(x_MD, dtype=torch.float32)
    for e in idx_MK.unique().tolist():
        token, slot = (idx_MK == e).nonzero(as_tuple=True)
        x = x_MD[token]
        g = torch.nn.functional.linear(x, matrix(gate, gate_scale, e))
        u = torch.nn.functional.linear(x, matrix(up, up_scale, e))
        h = swiglu(g, u, limit).to(x_MD.dtype)
        out = torch.nn.functional.linear(h, matrix(down, down_scale, e)).float()
        y_MD.index_add_(0, token, out * weights_MK[token, slot, None])
    return y_MD.to(x_MD.dtype)


@moe_experts.register_fake
def _(x_MD, weights_MK, idx_MK, gate, up, down, gate_scale, up_scale, down_scale, rows, columns, limit):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_MD)
