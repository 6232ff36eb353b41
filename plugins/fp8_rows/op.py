"""to_fp8 and from_fp8: float32 numbers as E4M3, and back.

They are ops because a cast to E4M3, which is what an exporter makes of a conversion, is refused by TensorRT: there only
QuantizeLinear makes numbers of that type.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("v4::to_fp8", mutates_args=())
def to_fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 numbers, of two that are as near the even one; beyond 448 it is 448.

    Args:
        x: float32, of any shape.

    Returns:
        float8_e4m3fn of the same shape.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn)


@to_fp8.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("v4::from_fp8", mutates_args=())
def from_fp8(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in float32, exactly."""
    return x.to(torch.float32, copy=True)


@from_fp8.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)
