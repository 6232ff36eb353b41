"""int4_dequantize: a matrix of packed four-bit integers with one multiplier per block of a row, widened."""

from __future__ import annotations

import torch

from v4export.plugins.block_dequantize.op import pairs

#: Integers by their four bits.
INT4 = (*map(float, range(8)), *map(float, range(-8, 0)))


@torch.library.custom_op("v4::int4_dequantize", mutates_args=())
def int4_dequantize(w: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """``W[n, k] = w[n, k] * scale[n, k // columns]``, in the type of the multipliers.

    Args:
        w: packed integers of -8 to 7 in uint8 [N, K/2], the even column in the low bits.
        scale: [N, K/columns].
        columns: of a block.
    """
    return (pairs(w, INT4) * scale.float().repeat_interleave(columns, 1)).to(scale.dtype)


@int4_dequantize.register_fake
def _(w, scale, columns):  # type: ignore[no-untyped-def]
    return scale.new_empty((w.shape[0], 2 * w.shape[1]))
