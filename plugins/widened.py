"""A stored matrix as a wide one, whatever its format: in PyTorch, and as nodes of a body."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from v4export.plugins.block_dequantize.onnx import dequantize
from v4export.plugins.block_dequantize.op import block_dequantize
from v4export.plugins.function_body import Body
from v4export.plugins.int4_dequantize import onnx as int4
from v4export.plugins.int4_dequantize.op import int4_dequantize

#: Name of the format that has an operator of its own.
INT4 = "int4"
#: Float32 powers of two of E8M0 bytes.
POWERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)


def widened(
    format: str,
    w: torch.Tensor,
    scale: torch.Tensor,
    scale_2: torch.Tensor | None,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The matrix [N, K] in ``dtype``.

    Args:
        format: its name.
        w: [N, K], or packed in uint8 [N, K/2].
        scale: multipliers of blocks.
        scale_2: [1, 1], multiplier of the multipliers, where they are FP8.
        block: rows and columns of a block, 0 columns being all of a row.
        dtype: of the result. TensorRT widens to the type of 16-bit multipliers alone, and so does this first.
    """  # fmt: skip
    if scale_2 is not None:
        scale = block_dequantize(scale, scale_2, *scale.shape, torch.bfloat16)
    if format == INT4:
        return int4_dequantize(w, scale, block[1]).to(dtype)
    own = dtype if scale.dtype == torch.float32 else scale.dtype
    return block_dequantize(w, scale, block[0], block[1] or w.shape[1], own).to(dtype)


def widen(
    b: Body,
    format: str,
    w: ir.Value,
    scale: ir.Value,
    scale_2: ir.Value | None,
    shape: Sequence[int],
    block: Sequence[int],
    dtype: ir.DataType,
) -> ir.Value:
    """The same of a matrix ``shape`` [1, N, K] in a body; its 16-bit multipliers make it bfloat16, not ``dtype``.

    A block has as many dimensions as the matrix.
    """
    block = [*block[:-1], block[-1] or shape[-1]]
    if scale_2 is not None:
        grid = [-(-n // size) for n, size in zip(shape, block, strict=True)]
        scale = dequantize(b, scale, scale_2, grid, grid, ir.DataType.BFLOAT16)
    if format == INT4:
        return int4.dequantize(b, w, scale, len(shape), block[-1], ir.DataType.BFLOAT16)
    return dequantize(b, w, scale, shape, block, dtype if has_wide_scales(format) else ir.DataType.BFLOAT16)


def powers_of_two(b: Body, exponents: ir.Value) -> ir.Value:
    """bfloat16 multipliers of E8M0 bytes: 2^(n - 127), exactly."""
    found = b.op("Gather", b.const(POWERS, np.float32), b.cast(exponents, ir.DataType.INT32), axis=0)
    return b.cast(found, ir.DataType.BFLOAT16)


def has_wide_scales(format: str) -> bool:
    """Whether a format's multipliers are float32, so that a matrix becomes any type at once."""
    return format.startswith("fp8")
