"""Matrices to and from the formats of ``v4export/precision.py``, some rows at a time.

Numbers are rounded by PyTorch, FP4 by ml_dtypes; what is chosen here are the multipliers:

* FP8 and MX formats: so that a block's largest number is the format's largest (``formats.py``);
* integers: a block's number of largest magnitude, with its sign, becomes about the lowest integer, which has one step
  more than the highest, as in ggml's Q4_0; of some multipliers near it the one with the least squared error;
* NVFP4: of some multipliers E4M3 near a block's largest number over 6, the one with the least squared error. They share
  a power of two, so that a multiplier's product with it is a bfloat16, which TensorRT makes of it.

Those of NVFP4 are searched by NVIDIA's Model Optimizer where a recipe says so (``by_modelopt.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from v4export.checkpoint.by_modelopt import searched
from v4export.checkpoint.e2m1 import E2M1_MAX, e2m1_codes, packed, round_to_e2m1
from v4export.checkpoint.formats import (
    E4M3_MAX,
    decode,
    dequantize_blocks,
    dequantize_fp4,
    quantize_blocks,
    quantize_fp4,
    unpacked,
)
from v4export.precision import Format

#: Multipliers tried for a block, relative to the one that its largest number suggests. Of 8 bits none is much better.
_TRIED = {4: np.linspace(0.8, 1.1, 7, dtype=np.float32).tolist(), 8: [1.0]}
_E4M3_LEAST = 2.0**-9
#: Blocks whose multipliers are tried at a time, as many as a cache holds.
_CACHED = 8192


class Narrow(NamedTuple):
    """Some rows of a matrix in a format: numbers, or bytes of two; multipliers; their own multiplier [1, 1] or None."""

    numbers: np.ndarray
    scale: np.ndarray
    scale_2: np.ndarray | None = None


def narrow(w: np.ndarray, format: Format, scale_2: np.ndarray | None = None) -> Narrow:
    """Finite float32 rows [n, K] in a format that has multipliers; ``scale_2`` is the matrix's, of ``outer_scale``."""
    assert format.block is not None
    if format.outer:
        assert scale_2 is not None
        return _nvfp4(w, format, scale_2)
    if format.dtype == "float4_e2m1fn":
        numbers, scale = quantize_fp4(w)
        return Narrow(numbers, scale.astype(ml_dtypes.bfloat16))
    if format.dtype in ("int8", "int4"):
        return _integers(w, format)
    rows, columns = format.block[0], format.columns(w.shape[1])
    numbers, scale = quantize_blocks(w, rows, columns, format.power_of_two)
    return Narrow(numbers, scale.astype(getattr(ml_dtypes, format.scale, np.float32)))


def widen(stored: Narrow, format: Format) -> np.ndarray:
    """Float32 [n, K] of rows in a format."""
    assert format.block is not None
    scale = decode(stored.scale)
    if stored.scale_2 is not None:
        scale = scale * stored.scale_2
    if format.dtype == "float8_e4m3fn":
        columns = format.columns(stored.numbers.shape[1])
        return dequantize_blocks(stored.numbers, scale, (format.block[0], columns))
    if format.dtype == "float4_e2m1fn" and format.block[1] == 32:
        return dequantize_fp4(stored.numbers, scale)
    numbers = unpacked(stored.numbers, getattr(ml_dtypes, format.dtype)) if format.packed else stored.numbers
    blocks = numbers.astype(np.float32).reshape(len(numbers), -1, format.block[1])
    return (blocks * scale[:, :, None]).reshape(len(numbers), -1)


def outer_scale(largest: float) -> np.ndarray:
    """[1, 1], the multiplier of a matrix's multipliers given its largest magnitude: that of the largest is at most 448.

    At least a quarter of that, so that blocks whose largest number is a millionth as large keep a multiplier.
    """
    least = max(largest, 1e-30) / E2M1_MAX / E4M3_MAX
    return np.full((1, 1), 2.0 ** np.ceil(np.log2(least)), np.float32)


class _Rounding(NamedTuple):
    """How multipliers are stored and read, and how numbers in steps of one are rounded."""

    store: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]
    round: Callable[[Tensor], Tensor]


def _nvfp4(w: np.ndarray, format: Format, scale_2: np.ndarray) -> Narrow:
    outer = float(scale_2[0, 0])
    kind = _Rounding(
        lambda exact: exact.clamp(_E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn),
        lambda stored: stored.float() * outer,
        round_to_e2m1,
    )
    x_CN = _blocks(w, format)
    if format.search:
        multipliers = [searched(x_CN, outer, lambda x, whole: round_to_e2m1(x / whole) * whole) / outer]
    else:
        multipliers = _tried(x_CN.abs().amax(0) / E2M1_MAX / outer, format)
    steps_CN, scale_N = _best(x_CN, multipliers, kind)
    codes = e2m1_codes(steps_CN).t().reshape(w.shape)
    scale = scale_N.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return Narrow(packed(codes).numpy(), scale.reshape(len(w), -1), scale_2)


def _integers(w: np.ndarray, format: Format) -> Narrow:
    low = -(2 ** (format.bits - 1))
    kind = _Rounding(
        lambda exact: exact.to(torch.bfloat16),
        lambda stored: stored.float().masked_fill_(stored == 0, 1),  # of a block of zeros
        lambda x: x.round_().clamp_(low, -low - 1),
    )
    x_CN = _blocks(w, format)
    least_N, most_N = x_CN.amin(0), x_CN.amax(0)
    largest_N = torch.where(most_N > -least_N, most_N, least_N)
    steps_CN, scale_N = _best(x_CN, _tried(largest_N / low, format), kind)
    numbers = kind.round(steps_CN).t().reshape(w.shape).to(torch.int8)
    scale = scale_N.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return Narrow(
        (packed(numbers.view(torch.uint8) & 15) if format.packed else numbers).numpy(), scale.reshape(len(w), -1)
    )


def _blocks(w: np.ndarray, format: Format) -> Tensor:
    """Float32 [C, N], the C numbers of each of N blocks."""
    assert format.block is not None
    return torch.from_numpy(np.ascontiguousarray(w)).view(-1, format.block[1]).t().contiguous()


def _tried(ideal_N: Tensor, format: Format) -> list[Tensor]:
    return [ideal_N * factor for factor in _TRIED[format.bits]]


def _best(x_CN: Tensor, multipliers: Sequence[Tensor], kind: _Rounding) -> tuple[Tensor, Tensor]:
    """Of each block the numbers in steps [C, N] of the stored multiplier [N] that has the least squared error."""
    steps_CN, scale_N = torch.empty_like(x_CN), kind.store(multipliers[0])
    for start in range(0, x_CN.shape[1], _CACHED):
        some = slice(start, start + _CACHED)
        x, best, least = x_CN[:, some], scale_N[some], None
        for scale in (kind.store(exact[some]) for exact in multipliers if len(multipliers) > 1):
            whole = kind.read(scale)
            error = _sum(kind.round(x / whole).mul_(whole).sub_(x).square_())
            least = error if least is None else least
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        steps_CN[:, some], scale_N[some] = x / kind.read(best), best
    return steps_CN, scale_N


def _sum(x_CN: Tensor) -> Tensor:
    """Of the C numbers, a power of two of them, in one order on every machine, lest another one choose otherwise."""
    while len(x_CN) > 1:
        half = len(x_CN) // 2
        x_CN = x_CN[:half] + x_CN[half:]
    return x_CN[0]
