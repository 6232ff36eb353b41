"""Linear: y = x W^T (+ b), with W in the activations' type or in a narrow format."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from v4export.plugins.round_to_fp8.op import round_to_fp8
from v4export.plugins.widened import widened
from v4export.precision import PLAIN, Format, Precision

#: What PyTorch holds numbers of these types in; of four-bit ones there are two in a byte.
_HELD = {"float4_e2m1fn": torch.uint8, "int4": torch.uint8}


def activations_of(precision: Precision) -> torch.dtype:
    """The type of a recipe's activations."""
    dtype: torch.dtype = getattr(torch, precision.activations)
    return dtype


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """An uninitialised weight that no optimiser will see."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """A matrix named as the Hub names it: ``weight``, ``weight_scale_inv`` for its multipliers, ``bias``.

    ``input_scale`` is there once it is told to ``round_inputs``.

    Args:
        width: of the input.
        out: of the output.
        dtype: of activations, and of the matrix until it is told to ``hold`` it otherwise.
        bias: whether there is one.

    Attributes:
        format: of the matrix.
    """

    def __init__(self, width: int, out: int, dtype: torch.dtype, *, bias: bool = False):
        super().__init__()
        self.shape, self.dtype = (out, width), dtype
        self.format = PLAIN[str(dtype).removeprefix("torch.")]
        self.weight = parameter(out, width, dtype=dtype)
        self.bias = parameter(out, dtype=dtype) if bias else None
        self.register_parameter("input_scale", None)

    def hold(self, format: Format) -> None:
        """Hold the matrix in that format from now on; its values are lost."""
        (out, width), self.format = self.shape, format
        held = _HELD.get(format.dtype) or getattr(torch, format.dtype)
        self.weight = parameter(out, width // 2 if format.packed else width, dtype=held)
        if format.block:
            grid = -(-out // format.block[0]), -(-width // format.columns(width))
            self.weight_scale_inv = parameter(*grid, dtype=getattr(torch, format.scale))
        if format.outer:
            self.weight_scale_2 = parameter(1, 1)

    def round_inputs(self) -> None:
        """Round what is multiplied to FP8 from now on, by a scale that is uninitialised."""
        self.input_scale = parameter()

    def matrix(self) -> torch.Tensor:
        """The weight [out, in] in the activations' type."""
        if self.format.block is None:
            return self.weight if self.weight.dtype == self.dtype else self.weight.to(self.dtype)
        scale_2 = self.weight_scale_2 if self.format.outer else None
        return widened(self.format.name, self.weight, self.weight_scale_inv, scale_2, self.format.block, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        w, bias = self.matrix() if self.format.scaled else self.weight, self.bias
        if self.input_scale is not None:
            x = round_to_fp8(x, self.input_scale)
        if w.dtype == x.dtype:
            return nn.functional.linear(x, w, bias)
        return nn.functional.linear(x.to(w.dtype), w, bias if bias is None else bias.to(w.dtype)).to(x.dtype)

    def in_float32(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> float32 [..., out], the product in float32 whatever the activations' type."""
        return nn.functional.linear(x.float(), self.matrix().float())


def hold(module: nn.Module, format_of: Callable[[str], Format]) -> nn.Module:
    """Let every Linear inside hold its matrix in the format that the matrix has by its name within the module."""
    for name, one in module.named_modules():
        if isinstance(one, Linear) and (found := format_of(f"{name}.weight")) != one.format:
            one.hold(found)
    return module
