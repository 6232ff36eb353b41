"""FP4 numbers, E2M1: codes by ml_dtypes, and the same rounding in PyTorch's arithmetic for searches.

Where multipliers are tried, everything is rounded seven times and more, and PyTorch has no such type to convert to.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

E2M1_MAX = 6.0
#: The bits of a float32's exponent, of which the least is worth 2^23.
_EXPONENT = 0x7F800000


def round_to_e2m1(x: Tensor) -> Tensor:
    """Float32 of any shape, each the nearest number E2M1 has, the even one of two; what is above 6 becomes 6."""
    size = x.abs().clamp_(max=E2M1_MAX)
    # Adding 2^22 rounds to halves, which E2M1 has below 2; 2^23 to ones, which it has below 4; 2^24 to twos.
    exponents = size.clamp(min=1).view(torch.int32).bitwise_and_(_EXPONENT)
    far = exponents.add_(22 << 23).view(torch.float32)
    return size.add_(far).sub_(far).copysign_(x)


def e2m1_codes(numbers: Tensor) -> Tensor:
    """Codes uint8, 0 to 15, of float32 numbers of any shape, rounded as above; of what is negative 8 and more."""
    clipped = numbers.clamp(-E2M1_MAX, E2M1_MAX).numpy()
    return torch.from_numpy(clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15)


def packed(codes: Tensor) -> Tensor:
    """Bytes uint8 [n, K/2] of four-bit codes uint8 [n, K], the even column in the low bits."""
    return codes[:, ::2] | codes[:, 1::2] << 4
