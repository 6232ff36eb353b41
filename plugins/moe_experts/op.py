"""moe_experts: the SwiGLU experts that tokens chose, weighted and added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from v4export.plugins.round_to_fp8.op import rounded
from v4export.plugins.widened import widened


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(gate) * up in float32; with a limit, gate is cut off above it and up beyond it on both sides."""
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up


def one_by_one(
    x_MD: torch.Tensor,
    weights_MK: torch.Tensor,
    idx_MK: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The weighted sum [M, D], in float32, of what ``expert`` makes of the tokens that chose it, by its number."""
    y_MD = torch.zeros_like(x_MD, dtype=torch.float32)
    for e in idx_MK.unique().tolist():
        token, slot = (idx_MK == e).nonzero(as_tuple=True)
        y_MD.index_add_(0, token, expert(e, x_MD[token]).float() * weights_MK[token, slot, None])
    return y_MD.to(x_MD.dtype)


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
    gate_scale_2: Sequence[torch.Tensor],
    up_scale_2: Sequence[torch.Tensor],
    down_scale_2: Sequence[torch.Tensor],
    format: str,
    rows: int,
    columns: int,
    limit: float | None,
    input_scale: torch.Tensor | None = None,
    middle_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``y = sum_k w_k * down_k (silu(gate_k x) * (up_k x))``; only chosen experts are computed.

    DeepSeek-V3 (arXiv 2412.19437, eq. 12). SwiGLU's product and the sum over k are float32.

    Args:
        x_MD: tokens [M, D].
        weights_MK: float32 [M, K].
        idx_MK: int64 [M, K].
        gate: E matrices [F, D], in x's dtype or what the format says; packed ones uint8 [F, D/2].
        up: E matrices [F, D].
        down: E matrices [D, F].
        gate_scale: E block multipliers where the format has any, else empty; so for the other two.
        up_scale: as ``gate_scale``.
        down_scale: as ``gate_scale``.
        gate_scale_2: E multipliers [1, 1] of those multipliers where these are FP8, else empty.
        up_scale_2: as ``gate_scale_2``.
        down_scale_2: as ``gate_scale_2``.
        format: of the matrices, by its name (``v4export/precision.py``); empty where they have x's dtype.
        rows: height of a block.
        columns: width of a block.
        limit: of ``swiglu``.
        input_scale: float32 [E], by which tokens are rounded to FP8 ahead of an expert's gate and up, if they are.
        middle_scale: the same of what down multiplies.

    Returns:
        [M, D] in x's dtype.
    """

    def matrix(
        stack: Sequence[torch.Tensor], scale: Sequence[torch.Tensor], scale_2: Sequence[torch.Tensor], e: int
    ) -> torch.Tensor:
        if not format:
            return stack[e]
        return widened(format, stack[e], scale[e], scale_2[e] if scale_2 else None, (rows, columns), x_MD.dtype)

    def expert(e: int, x: torch.Tensor) -> torch.Tensor:
        x = x if input_scale is None else rounded(x, input_scale[e])
        g = torch.nn.functional.linear(x, matrix(gate, gate_scale, gate_scale_2, e))
        u = torch.nn.functional.linear(x, matrix(up, up_scale, up_scale_2, e))
        h = swiglu(g, u, limit).to(x_MD.dtype)
        h = h if middle_scale is None else rounded(h, middle_scale[e])
        return torch.nn.functional.linear(h, matrix(down, down_scale, down_scale_2, e))

    return one_by_one(x_MD, weights_MK, idx_MK, expert)


@moe_experts.register_fake
def _(x_MD, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_MD)
