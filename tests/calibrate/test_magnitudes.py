"""Ranges from counted magnitudes, against the numbers themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from v4export.calibrate.magnitudes import Magnitudes, Method
from v4export.calibrate.ranges import found
from v4export.errors import BadInput, NotSupported

RNG = np.random.default_rng(5)
#: Of a bell curve; with a few numbers far beyond the others; tiny ones; all equal.
NUMBERS = {
    "bell": RNG.normal(size=(200, 64)),
    "outliers": np.where(RNG.random((200, 64)) < 3e-4, 90.0, RNG.normal(size=(200, 64))),
    "tiny": RNG.normal(size=(50, 8)) * 1e-12,
    "equal": np.full((3, 5), -2.5),
}


def seen(x: np.ndarray, portions: int = 1) -> Magnitudes:
    all_of_them = Magnitudes(counted=True)
    for part in np.array_split(x.astype(np.float32), portions):
        all_of_them.add(torch.from_numpy(part))
    return all_of_them


def error(x: np.ndarray, largest: float) -> float:
    """Mean square error of rounding numbers to FP8 that covers a range."""
    scale = np.float32(largest / 448)
    codes = np.clip(x.astype(np.float32) / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return float(np.square(codes.astype(np.float64) * scale - x).mean())


@pytest.mark.parametrize("x", NUMBERS.values(), ids=NUMBERS)
def test_ranges(x):
    magnitudes, size = seen(x), np.abs(x.astype(np.float32))
    assert Method("max").range(magnitudes) == size.max() and magnitudes.tokens == len(x)
    for percentile in (99.0, 99.99, 100.0):
        exact = np.percentile(size, percentile, method="inverted_cdf")
        range_ = Method("percentile", percentile).range(magnitudes)
        assert exact <= range_ <= exact * (1 + 2**-8) and range_ <= size.max()
    best = Method("mse").range(magnitudes)
    tried = size.max() * 2.0 ** (-np.arange(41) / 8)
    assert best <= size.max()
    # Numbers are counted to one part in 256: what they are rounded to is known a little less well.
    assert error(x, best) <= min(error(x, one) for one in tried) * 1.02


def test_methods_differ_where_a_few_numbers_are_far_beyond_the_others():
    magnitudes = seen(NUMBERS["outliers"])
    assert Method("percentile", 99.9).range(magnitudes) < 6 < Method("max").range(magnitudes) == 90


def test_neither_portions_nor_order_matter():
    x = NUMBERS["outliers"]
    whole, parts = seen(x), seen(x[::-1], 7)
    np.testing.assert_array_equal(whole.counts, parts.counts)
    assert (whole.largest, whole.tokens) == (parts.largest, parts.tokens)


def test_max_counts_nothing():
    magnitudes = Method("max").watcher()
    magnitudes.add(torch.ones(4, 3))
    assert (magnitudes.largest, magnitudes.tokens, magnitudes.counts.size) == (1.0, 4, 0)


@pytest.mark.parametrize("name", ["max", "percentile", "mse"])
def test_zeros_and_nothing(name):
    method = Method(name)
    for x in (torch.zeros(5, 4), torch.zeros(0, 4)):
        magnitudes = method.watcher()
        magnitudes.add(x)
        assert method.range(magnitudes) == 0
        one = found("a.input_scale", False, [magnitudes], method, 16)
        assert one.values.shape == () and one.values == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["max", "percentile"])
def test_what_is_not_finite_is_refused(name, value):
    method = Method(name)
    magnitudes = method.watcher()
    magnitudes.add(torch.tensor([[1.0, value], [2.0, 3.0]]))
    with pytest.raises(NotSupported, match=r"not finite\n  what b\.input_scale is of"):
        found("b.input_scale", False, [magnitudes], method, 16)


def test_scales_are_a_range_over_448():
    one = found("a.input_scale", False, [seen(NUMBERS["equal"])], Method("max"), 16)
    assert one.values.dtype == np.float32 and one.values == np.float32(2.5) / np.float32(448)


def test_rare_experts_borrow():
    def expert(tokens: int, largest: float) -> Magnitudes:
        return seen(np.full((tokens, 2), largest))

    experts = [expert(20, 2.0), expert(3, 5.0), expert(16, 4.0), expert(0, 0.0), expert(15, 1.0)]
    one = found("m.experts.input_scale", True, experts, Method("max"), 16)
    assert one.borrowed == (1, 3, 4) and one.tokens == (20, 3, 16, 0, 15)
    assert one.ranges == (2.0, 5.0, 4.0, 4.0, 4.0), "the largest of those seen often, or an own that is larger"
    assert one.values.shape == (5,)
    none = found("m.experts.input_scale", True, experts[3:], Method("max"), 16)
    assert none.ranges == (1.0, 1.0), "where all are rare, the largest of all"
    # A linear layer has nobody to borrow from.
    assert found("a.input_scale", False, [expert(3, 5.0)], Method("max"), 16).borrowed == ()


@pytest.mark.parametrize(("name", "percentile", "text"), [("mean", 99, "unknown method"), ("max", 20, "half")])
def test_bad_methods(name, percentile, text):
    with pytest.raises(BadInput, match=text):
        Method(name, percentile)
