"""Stored number formats to and from float32: FP8 E4M3 and FP4 E2M1 with a multiplier per block, and plain float types.

A block-scaled weight is ``W[n, k] = float(W8[n, k]) * scale[n // rows, k // columns]``: despite its name
``weight_scale_inv`` multiplies. The grid is rounded up, so the last blocks may be narrower.

FP4 weights are stored two in a byte, the even column in its low half, and share a multiplier per row and 32 columns
(OCP Microscaling Formats v1.0, MXFP4). A multiplier of E8M0, a byte b, is 2 ** (b - 127); 255 is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import torch

from v4export.checkpoint.e2m1 import e2m1_codes, packed

E4M3_MAX = 448.0
# Below this a scale would leave too few bits for exact products; 2**-10 of it is what rounds to zero in E4M3.
_SCALE_MIN = np.float32(2.0**-100)
#: Rows quantised at a time.
_STRIP = 128
_BYTE_TABLES: dict[np.dtype, np.ndarray] = {}

FP8_ROW = (1, 32)  # rows and columns of an Engram table that share a multiplier
FP4_BLOCK = (1, 32)  # rows and columns that share a multiplier
# Halves of 6 and the next value there would be: what is above this would be nearer to 8, and is cut off.
_E2M1_LIMIT = np.float32(7.0)
_E8M0_EXPONENTS = (-127, 127)


def decode(array: np.ndarray) -> np.ndarray:
    """A float array of any stored dtype as float32, exact for every type up to 32 bits."""
    if array.dtype.itemsize != 1:
        return array.astype(np.float32)
    table = _BYTE_TABLES.get(array.dtype)
    if table is None:
        table = _BYTE_TABLES[array.dtype] = np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)
    return table[array.view(np.uint8)]


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the multipliers of a weight [..., N, K]: [..., ceil(N / rows), ceil(K / columns)]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def dequantize_blocks(w8: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Float32 [N, K] of an E4M3 weight [N, K] and its multipliers (float32, bfloat16 or E8M0).

    Raises:
        ValueError: the multipliers are not on the weight's grid.
    """
    if scale.shape != grid(w8.shape, block):
        raise ValueError(f"scale {scale.shape}, expected {grid(w8.shape, block)} for {w8.shape} in blocks of {block}")
    rows, columns = block
    out, scale = decode(w8), decode(scale)
    for i in range(scale.shape[0]):
        out[i * rows : (i + 1) * rows] *= np.repeat(scale[i], columns)[: w8.shape[1]]
    return out


def quantize_blocks(
    w: np.ndarray, rows: int = 128, cols: int = 128, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 [N, K] and float32 multipliers of a finite float32 weight [N, K]; each block's maximum is stored as 448.

    Multipliers keep 20 significant bits, so every product with an E4M3 value is exact in float32, and quantising what
    was dequantised gives the same bits. A block of zeros has multiplier 1.

    With ``power_of_two`` the multiplier is the least power of two that leaves the block's maximum at most 464: what is
    above 448 still rounds to 448, and the next smaller power would clip.
    """
    n, k = w.shape
    x = torch.from_numpy(np.ascontiguousarray(w))
    w8 = torch.empty((n, k), dtype=torch.float8_e4m3fn)
    scale = np.empty(grid((n, k), (rows, cols)), np.float32)
    ragged = (0, scale.shape[1] * cols - k)
    for start, stop, height in _strips(n, rows):
        blocks = x[start:stop].view(-1, height, k)
        peak = torch.nn.functional.pad(blocks.abs().amax(1), ragged).unflatten(1, (-1, cols)).amax(2)
        own = _multiplier(peak.numpy(), power_of_two)
        scale[start // rows : start // rows + len(own)] = own
        scaled = blocks / torch.from_numpy(own).repeat_interleave(cols, 1)[:, None, :k]
        w8[start:stop] = scaled.clamp_(-E4M3_MAX, E4M3_MAX).view(-1, k)
    return w8.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), scale


def _strips(n: int, height: int) -> Iterator[tuple[int, int, int]]:
    """Rows of blocks some at a time, as many as a cache holds: from where to where, and of how many rows a block is."""
    whole, step = n - n % height, max(height, _STRIP // height * height)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), height
    if whole < n:
        yield whole, n, n - whole


def _multiplier(peak: np.ndarray, power_of_two: bool) -> np.ndarray:
    ratio = np.maximum(peak / np.float32(464.0 if power_of_two else E4M3_MAX), _SCALE_MIN)
    mantissa, exponent = np.frexp(ratio)
    # frexp's mantissa is in [0.5, 1): exactly 0.5 is a power of two already.
    kept = np.where(mantissa > 0.5, 1.0, 0.5) if power_of_two else np.floor(mantissa * 2.0**20) / 2.0**20
    scale = np.ldexp(kept.astype(np.float32), exponent)
    return np.where(peak <= _SCALE_MIN * 2.0**-10, np.float32(1), scale)


def unpacked(packed: np.ndarray, kind: type) -> np.ndarray:
    """Float32 [N, K] of bytes [N, K / 2] of two numbers of a four-bit type, the even column in the low bits."""
    half_bytes = np.arange(16, dtype=np.uint8).view(kind).astype(np.float32)
    pairs = np.stack([np.tile(half_bytes, 16), np.repeat(half_bytes, 16)], axis=1)
    return pairs[packed.view(np.uint8)].reshape(len(packed), -1)


def dequantize_fp4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Float32 [N, K] of packed E2M1 bytes [N, K / 2] and multipliers [N, K / 32] (E8M0, bfloat16 or float32).

    Raises:
        ValueError: the multipliers are not on the weight's grid.
    """
    n, half = packed.shape
    if scale.shape != (n, half // 16) or half % 16:
        raise ValueError(f"scale {scale.shape}, expected {(n, half // 16)} for {packed.shape} bytes of two FP4 numbers")
    values = unpacked(packed, ml_dtypes.float4_e2m1fn).reshape(n, half // 16, FP4_BLOCK[1])
    values *= decode(scale)[:, :, None]
    return values.reshape(n, 2 * half)


def quantize_fp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed E2M1 bytes uint8 [N, K / 2] and float32 multipliers [N, K / 32] of a finite float32 weight [N, K].

    A multiplier is the least power of two that E8M0 has and that leaves the block's maximum at most 7, which still
    rounds to 6; so the largest number of a block becomes 4 or 6, and quantising what was dequantised gives the same
    bits. Numbers are rounded to the nearest, and to the even one of two. A block that is zero, or rounds to it, has
    multiplier 1.

    Raises:
        ValueError: K is not a multiple of 32.
    """
    n, k = w.shape
    if k % FP4_BLOCK[1]:
        raise ValueError(f"{k} columns, expected a multiple of {FP4_BLOCK[1]}")
    x = torch.from_numpy(np.ascontiguousarray(w)).view(n, -1, FP4_BLOCK[1])
    numbers = torch.empty((n, k // 2), dtype=torch.uint8)
    scale = np.empty(x.shape[:2], np.float32)
    for start in range(0, n, _STRIP):
        some = slice(start, start + _STRIP)
        scale[some] = _power_of_two(x[some].abs().amax(2).numpy())
        # A power of two that E8M0 has may lie below float32's normal numbers, whose reciprocal float32 lacks: divide.
        scaled = x[some] / torch.from_numpy(scale[some])[:, :, None]
        numbers[some] = packed(e2m1_codes(scaled).view(-1, k))
    return numbers.numpy(), scale


def _power_of_two(peak: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(peak / _E2M1_LIMIT)
    # frexp's mantissa is in [0.5, 1): exactly 0.5 is a power of two already.
    exponent = np.clip(np.where(mantissa > 0.5, exponent, exponent - 1), *_E8M0_EXPONENTS)
    exponent = np.where(peak > 2.0 ** (_E8M0_EXPONENTS[0] - 2), exponent, 0)
    return np.ldexp(np.float32(1), exponent)
