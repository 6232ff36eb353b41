"""Linear: y = x W^T (+ b), with W in the activations' type or in FP8 blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from v4export.config import Fp8Blocks
from v4export.plugins.block_dequantize.op import block_dequantize


@dataclass(frozen=True)
class Storage:
    """How a model's weights are held: the activations' type, and the formats of its large matrices.

    Attributes:
        dtype: of activations and of everything that is not said otherwise.
        fp8: block format of linear layers and experts, or None where they have the activations' type.
        fp4_experts: experts are packed E2M1 numbers with a multiplier per 32.
    """

    dtype: torch.dtype = torch.float32
    fp8: Fp8Blocks | None = None
    fp4_experts: bool = False


#: Everything in float32.
IN_FLOAT32 = Storage()


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised weight that no optimiser will see."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """A matrix named as the Hub names it: ``weight``, ``weight_scale_inv`` for FP8 blocks, ``bias``."""

    def __init__(self, width: int, out: int, storage: Storage, *, plain: bool = False, bias: bool = False):
        super().__init__()
        self.fp8, self.dtype = (None if plain else storage.fp8), storage.dtype
        self.weight = parameter(out, width, dtype=torch.float8_e4m3fn if self.fp8 else self.dtype)
        if self.fp8:
            self.weight_scale_inv = parameter(-(-out // self.fp8.rows), -(-width // self.fp8.columns))
        self.bias = parameter(out, dtype=self.dtype) if bias else None

    def matrix(self) -> torch.Tensor:
        """The weight [out, in] in the activations' type."""
        if self.fp8 is None:
            return self.weight
        return block_dequantize(self.weight, self.weight_scale_inv, self.fp8.rows, self.fp8.columns, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return nn.functional.linear(x, self.matrix(), self.bias)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> float32 [..., out], the product in float32 whatever the activations' type."""
        return nn.functional.linear(x.float(), self.matrix().float())
