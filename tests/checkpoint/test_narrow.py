"""Formats with multipliers, against what their documents say, number by number."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export.checkpoint.narrow import Narrow, narrow, outer_scale, widen
from v4export.precision import FORMATS, Format

SCALED = [f for f in FORMATS.values() if f.scaled]
#: The nearest and the largest number of each type of numbers, from its own document.
LARGEST = {"float8_e4m3fn": 448.0, "float4_e2m1fn": 6.0, "int8": 127.0, "int4": 7.0}


def matrix(rows: int = 8, width: int = 192, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) * np.exp2(rng.integers(-8, 2, (rows, 1)))).astype(np.float32)


def stored(w: np.ndarray, format: Format) -> Narrow:
    return narrow(w, format, outer_scale(float(np.abs(w).max())) if format.outer else None)


def by_hand(found: Narrow, format: Format, shape: tuple[int, int]) -> np.ndarray:
    """Each number times its block's multiplier, looked up one by one."""
    kind, out = np.dtype(getattr(ml_dtypes, format.dtype, format.dtype)), np.zeros(shape)
    columns = format.columns(shape[1])
    for n in range(shape[0]):
        for k in range(shape[1]):
            if format.packed:
                byte = int(found.numbers[n, k // 2])
                number = np.array([byte >> 4 if k % 2 else byte & 15], np.uint8).view(kind)[0]
            else:
                number = found.numbers[n, k]
            scale = float(found.scale[n // format.block[0], k // columns])
            out[n, k] = float(number) * scale * (1.0 if found.scale_2 is None else float(found.scale_2[0, 0]))
    return out


@pytest.mark.parametrize("format", SCALED, ids=lambda f: f.name)
def test_widening_is_the_equation(format):
    w = matrix()
    found = stored(w, format)
    np.testing.assert_array_equal(widen(found, format), by_hand(found, format, w.shape).astype(np.float32))
    assert found.scale.dtype == np.dtype(getattr(ml_dtypes, format.scale, format.scale))
    assert found.numbers.nbytes + found.scale.nbytes + 4 * format.outer == format.nbytes(*w.shape)


@pytest.mark.parametrize("format", SCALED, ids=lambda f: f.name)
def test_no_number_is_further_off_than_half_a_step(format):
    """With its block's multiplier, every number is rounded to the nearest there is, or cut off at the largest."""
    w = matrix(256, 256, seed=1)
    found = stored(w, format)
    wide, columns = widen(found, format), format.columns(256)
    scale = np.abs(found.scale.astype(np.float64)) * (1.0 if found.scale_2 is None else found.scale_2[0, 0])
    scale = np.repeat(np.repeat(scale, format.block[0], 0)[:256], columns, 1)[:, :256]
    in_steps, error = np.abs(w / scale), np.abs(wide - w) / scale
    inside = in_steps <= LARGEST[format.dtype]
    least = 0.25 if format.packed else 2.0**-10  # half of the step of subnormal numbers
    half = 0.5 if format.dtype.startswith("int") else np.maximum(in_steps * format.roundoff, least)
    assert (error <= half * 1.001)[inside].all()
    # Cut off are few, and by little: no more than multipliers below the plain one cost.
    assert inside.mean() > 0.9 and (error[~inside] <= 0.3 * LARGEST[format.dtype]).all()


@pytest.mark.parametrize("name", ["fp8", "fp8-row", "mxfp8", "mxfp4", "nvfp4"])
def test_again_is_the_same(name):
    """What was dequantised has a multiplier that gives it back."""
    format, w = FORMATS[name], matrix(seed=2)
    wide = widen(stored(w, format), format)
    np.testing.assert_array_equal(widen(stored(wide, format), format), wide)


def test_windows_do_not_show():
    """Rows are converted some at a time; the matrix's own multiplier is known before."""
    w = matrix(64, 64)
    for format in SCALED:
        if format.block[0] > 32:
            continue
        outer = outer_scale(float(np.abs(w).max())) if format.outer else None
        whole, parts = narrow(w, format, outer), [narrow(w[i : i + 32], format, outer) for i in (0, 32)]
        for index in (0, 1):
            np.testing.assert_array_equal(
                np.concatenate([p[index] for p in parts]).view(np.uint8), np.asarray(whole[index]).view(np.uint8)
            )


@pytest.mark.parametrize("format", SCALED, ids=lambda f: f.name)
def test_zeros_and_a_single_number(format):
    w = np.zeros((2, 64), np.float32)
    w[1, 5] = -3.0
    wide = widen(stored(w, format), format)
    assert (wide[0] == 0).all() and wide[1, 5] == pytest.approx(-3.0, rel=0.07) and (np.delete(wide[1], 5) == 0).all()


@given(st.floats(1e-20, 1e20))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_multipliers_of_multipliers_are_powers_of_two_that_leave_room(largest):
    (scale,) = outer_scale(largest).ravel()
    assert np.frexp(scale)[0] == 0.5
    assert 224 * (1 - 1e-6) <= largest / 6 / scale <= 448 * (1 + 1e-6)


@pytest.mark.parametrize(("name", "plain"), [("int4", 1.0), ("nvfp4", 1.0)])
def test_tried_multipliers_are_better_than_the_plain_one(name, plain, monkeypatch):
    from v4export.checkpoint import narrow as module

    format, w = FORMATS[name], matrix(64, 256, seed=3)
    tried = np.square(widen(stored(w, format), format) - w).sum()
    monkeypatch.setattr(module, "_TRIED", dict.fromkeys((4, 8), np.array([plain], np.float32)))
    assert tried < 0.95 * np.square(widen(stored(w, format), format) - w).sum()


def test_the_ends_of_integers_are_used():
    """A block's largest magnitude becomes about the lowest integer, whichever its sign."""
    for sign in (1, -1):
        w = np.linspace(-1, 1, 32, dtype=np.float32)[None] * sign
        w[0, 0] *= 1.5
        numbers = stored(w, FORMATS["int8"]).numbers
        assert numbers.min() == -128 and -128 <= numbers.max() <= 127
