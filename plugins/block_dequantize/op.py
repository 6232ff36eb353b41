"""block_dequantize: a matrix of narrow numbers with one multiplier per block, as a matrix of a wider type."""

from __future__ import annotations

import torch

#: E2M1 numbers by their four bits (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pairs(packed: torch.Tensor, table: tuple[float, ...]) -> torch.Tensor:
    """float32 [N, K] of uint8 [N, K/2], the even column in the low bits, by a table of 16 numbers."""
    numbers = torch.tensor(table, device=packed.device)
    return torch.stack([numbers[(packed & 15).long()], numbers[(packed >> 4).long()]], -1).flatten(-2)


@torch.library.custom_op("v4::block_dequantize", mutates_args=())
def block_dequantize(
    w_NK: torch.Tensor, scale: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """``W[n, k] = w[n, k] * scale[n // rows, k // columns]`` (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    Args:
        w_NK: float8_e4m3fn or int8 [N, K]; packed E2M1 in uint8 [N, K/2].
        scale: [ceil(N/rows), ceil(K/columns)]; despite its name on the Hub (weight_scale_inv) a multiplier.
        rows: block height.
        columns: block width.
        dtype: type of the result.
    """
    wide = pairs(w_NK, E2M1) if w_NK.dtype == torch.uint8 else w_NK.float()
    N, K = wide.shape
    grid = scale.float().repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
    return (wide * grid).to(dtype)


@block_dequantize.register_fake
def _(w_NK, scale, rows, columns, dtype):  # type: ignore[no-untyped-def]
    N, K = w_NK.shape
    return w_NK.new_empty((N, 2 * K if w_NK.dtype == torch.uint8 else K), dtype=dtype)
