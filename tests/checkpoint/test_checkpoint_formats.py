from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from v4export.checkpoint.formats import (
    E4M3_MAX,
    decode,
    dequantize_blocks,
    dequantize_fp4,
    grid,
    quantize_blocks,
    quantize_fp4,
)


@st.composite
def weights(draw):
    """[N, K] float32 of any magnitude, and a block shape that need not divide it."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    values = draw(npst.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32)))
    # Whole blocks far from 1, to the ends of float32.
    with np.errstate(over="ignore"):
        scaled = values * np.float32(2.0) ** draw(st.integers(-140, 117))
    return np.nan_to_num(scaled), draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))


def spread(scale, block, shape):
    return np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("power_of_two", [False, True])
@settings(max_examples=150, deadline=None)
@given(case=weights())
def test_round_trip(power_of_two, case):
    w, block = case
    w8, scale = quantize_blocks(w, *block, power_of_two)
    assert w8.dtype == ml_dtypes.float8_e4m3fn
    assert scale.dtype == np.float32
    assert scale.shape == grid(w.shape, block)
    assert (scale > 0).all()
    if power_of_two:
        assert (np.frexp(scale)[0] == 0.5).all()
    back = dequantize_blocks(w8, scale, block)
    each = spread(scale, block, w.shape).astype(np.float64)
    # Half a unit in the last of 4 significant bits, or 2**-10 of the scale where E4M3 is subnormal.
    bound = np.maximum(np.abs(w.astype(np.float64)) * 2.0**-4, each * 2.0**-10)
    small = spread(scale, block, w.shape) == 1
    assert (
        np.abs(back.astype(np.float64) - w) <= np.where(small, np.maximum(bound, 2.0**-109), bound) * (1 + 1e-6)
    ).all()
    # Bit for bit the same a second time.
    again8, again = quantize_blocks(back, *block, power_of_two)
    np.testing.assert_array_equal(again8.view(np.uint8) & 0x7F, w8.view(np.uint8) & 0x7F)
    np.testing.assert_array_equal(again, scale)
    np.testing.assert_array_equal(dequantize_blocks(again8, again, block), back)


def test_maximum_is_stored_as_the_largest_value():
    w = np.random.default_rng(0).standard_normal((300, 200), np.float32)
    w8, scale = quantize_blocks(w)
    peaks = np.abs(decode(w8))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            assert peaks[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].max() == E4M3_MAX


def test_zero_block():
    w8, scale = quantize_blocks(np.zeros((3, 5), np.float32))
    np.testing.assert_array_equal(scale, [[1]])
    assert not decode(w8).any()


def test_scale_multiplies():
    w8 = np.full((3, 5), 2, ml_dtypes.float8_e4m3fn)
    scale = np.array([[1, 2, 4], [0.5, 8, 16]], np.float32)
    want = [[2, 2, 4, 4, 8], [2, 2, 4, 4, 8], [1, 1, 16, 16, 32]]
    np.testing.assert_array_equal(dequantize_blocks(w8, scale, (2, 2)), want)
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu):
        np.testing.assert_array_equal(dequantize_blocks(w8, scale.astype(dtype), (2, 2)), want)
    with pytest.raises(ValueError, match="expected"):
        dequantize_blocks(w8, scale.T, (2, 2))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float32", "float64"]
)
def test_decode(dtype):
    values = np.array([[1, 2, 0.5], [4, 8, 16]])
    got = decode(values.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))[:, ::2])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values[:, ::2])


# Written down from the formats' definitions, and not by way of the library that the code uses.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def e4m3(byte):
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def bits(values):
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32).view(np.uint32)


def test_every_fp4_byte_with_every_multiplier():
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 1))
    scale = np.repeat(np.arange(255, dtype=np.uint8), 16)[:, None].view(ml_dtypes.float8_e8m0fnu)
    with np.errstate(over="ignore"):
        found = dequantize_fp4(packed, scale)
        signed = dequantize_fp4(packed.view(np.int8), scale)
    pairs = np.array([[E2M1[byte & 15], E2M1[byte >> 4]] for byte in range(256)]).reshape(16, 32)
    want = np.concatenate([pairs * 2.0 ** (byte - 127) for byte in range(255)])
    np.testing.assert_array_equal(bits(found), bits(want))
    np.testing.assert_array_equal(bits(signed), bits(want))
    assert found[0, 2] == 2.0**-128 != 0, "the least multiplier is subnormal in float32"


def test_every_fp8_byte_with_every_multiplier():
    w8 = np.tile(np.arange(256, dtype=np.uint8), (255, 1)).view(ml_dtypes.float8_e4m3fn)
    scale = np.arange(255, dtype=np.uint8)[:, None].view(ml_dtypes.float8_e8m0fnu)
    with np.errstate(over="ignore"):
        found = dequantize_blocks(w8, scale, (1, 256))
    want = np.array([e4m3(byte) for byte in range(256)]) * 2.0 ** (np.arange(255)[:, None] - 127)
    nan = np.isnan(want)
    assert nan.sum() == 2 * 255 and np.isnan(found[nan]).all()
    np.testing.assert_array_equal(bits(found[~nan]), bits(want[~nan]))


def test_fp4_multipliers_of_other_types():
    packed = np.arange(32, dtype=np.uint8).reshape(1, 32)
    scale = np.array([[2.0**-9, 2.0**5]])
    dtypes = (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu)
    found = [dequantize_fp4(packed, scale.astype(dtype)) for dtype in dtypes]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert found[0][0, 2] == 0.5 * 2.0**-9 and found[0][0, 63] == 0.5 * 2.0**5
    for wrong in (packed[:, :-1], packed[:, :16]):
        with pytest.raises(ValueError, match="expected"):
            dequantize_fp4(wrong, scale)


@st.composite
def fp4_weights(draw):
    shape = draw(st.integers(1, 4)), 32 * draw(st.integers(1, 3))
    values = draw(npst.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32)))
    with np.errstate(over="ignore"):
        return np.nan_to_num(values * np.float32(2.0) ** draw(st.integers(-140, 117)), posinf=1e38, neginf=-1e38)


@settings(max_examples=150, deadline=None)
@given(w=fp4_weights())
def test_fp4_round_trip(w):
    packed, scale = quantize_fp4(w)
    assert (packed.dtype, packed.shape) == (np.uint8, (w.shape[0], w.shape[1] // 2))
    assert (scale.dtype, scale.shape) == (np.float32, (w.shape[0], w.shape[1] // 32))
    # Powers of two that E8M0 has, hence bfloat16.
    np.testing.assert_array_equal(scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), scale)
    np.testing.assert_array_equal(scale.astype(ml_dtypes.float8_e8m0fnu).astype(ml_dtypes.bfloat16), scale)
    back = dequantize_fp4(packed, scale)
    each = np.repeat(scale, 32, axis=1).astype(np.float64)
    # Half the distance of neighbours: a quarter of 1 below 2, then a half, then 1.
    step = np.where(np.abs(back) < 2 * each, 0.25, np.where(np.abs(back) < 4 * each, 0.5, 1.0))
    error = np.abs(back.astype(np.float64) - w)
    assert (error <= np.maximum(step, 0.25) * each).all()
    again, same = quantize_fp4(back)
    np.testing.assert_array_equal(again, packed)
    np.testing.assert_array_equal(same, scale)


def test_fp4_rounds_to_even_and_cuts_off():
    w = np.zeros((1, 32), np.float32)
    w[0, :10] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -7.0, -0.25]
    packed, scale = quantize_fp4(w)
    assert scale.tolist() == [[1.0]]
    assert dequantize_fp4(packed, scale)[0, :10].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -6, 0]
    assert packed[0, 0] == 0x20, "the even column is the low half"
    w[0, 0] = np.nextafter(np.float32(7), np.float32(8))
    assert quantize_fp4(w)[1].tolist() == [[2.0]]
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_fp4(w[:, :16])


def test_fp4_block_of_zeros():
    packed, scale = quantize_fp4(np.zeros((2, 64), np.float32))
    assert not packed.any() and (scale == 1).all()


def test_fp4_of_any_stored_bytes_keeps_its_values():
    """Another model's multiplier need not be the one that is chosen here."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (64, 16), np.uint8) & rng.choice([0x99, 0xBB, 0xFF, 0xDD], (64, 1)).astype(np.uint8)
    values = dequantize_fp4(packed, rng.integers(100, 140, (64, 1)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu))
    again, scale = quantize_fp4(values)
    np.testing.assert_array_equal(dequantize_fp4(again, scale), values)
    assert (again != packed).any()
