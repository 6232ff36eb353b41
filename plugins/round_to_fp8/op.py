"""round_to_fp8: numbers rounded to E4M3 by a scale that was calibrated, in the type they had."""

from __future__ import annotations

import torch

#: The largest E4M3 number; what is beyond it becomes it.
E4M3_MAX = 448.0


def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``E4M3(clamp(x / scale, -448, 448)) * scale``, in float32, then in x's dtype; the scale may be broadcast."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


@torch.library.custom_op("v4::round_to_fp8", mutates_args=())
def round_to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """E4M3 rounds to the nearest, and to the even one of two (OCP 8-bit Floating Point Specification 1.0).

    Args:
        x: of any shape.
        scale: float32 [], positive.
    """
    return rounded(x, scale)


@round_to_fp8.register_fake
def _(x, scale):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)
