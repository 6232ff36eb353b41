"""index_select's kernels, emulated, beside the eager reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernel_checks import DTYPES, check, emulated, widened
from test_index_select import CASES, operands

from v4export.plugins.index_select.kernel import SCORE, TOP_K, kernels
from v4export.plugins.index_select.op import LOWEST, best_numbers, index_scores, index_select
from v4export.plugins.kernels.call import call

pytestmark = emulated
# S, C, ratio, positions, heads, width: with keys for a part of a warp, for some warps, and for more than a block
SHAPES = {
    "one key": (1, 0, 1, [0], 1, 1),
    "odd, and more queries than a block has": (19, 70, 3, [200, 0, 31], 5, 7),
    "eights": (2, 150, 1, [149, 60], 16, 40),
    "as published": (1, 133, 4, [523], 64, 128),
}


def steps(
    S: int, C: int, ratio: int, position: Sequence[int], H: int, width: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Operands of whole numbers: scores are exact in whatever order they are summed, and often equal."""
    _, _, arrays = operands(S, C, ratio, list(position), H, width, seed=S + C)
    q, weights, fresh, cache, at = map(torch.from_numpy, arrays)
    for b, p in enumerate(position):
        cache[b, p // ratio :] = float("nan")  # a key that is not there must not matter
    return [q.to(dtype), weights, fresh.to(dtype), cache.to(dtype), at]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_reference(case: tuple) -> None:
    S, C, K, ratio, position = case
    check(index_select, kernels, (*steps(S, C, ratio, position, 2, 4, torch.float32), K, ratio, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores(shape: tuple, dtype: torch.dtype) -> None:
    """In order of the keys' numbers, a hidden key's the lowest float; of any numbers close, of whole ones exactly."""
    ratio = shape[2]
    for whole in (True, False):
        args = steps(*shape, dtype)
        if not whole:
            args = [a + torch.randn(a.shape, dtype=a.dtype) / 3 if a.is_floating_point() else a for a in args]
        wanted = by_number(*index_scores(*map(widened, args), ratio, 0.3))
        (got,) = call(SCORE, *args, RATIO=ratio, SCALE=0.3)
        assert torch.equal(got == LOWEST, wanted == LOWEST)
        seen = wanted[wanted != LOWEST]
        limit = 0.0 if whole else 1e-5 * float(seen.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=limit)


def by_number(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Scores with each in the column of its key's number."""
    return torch.full_like(scores, LOWEST).scatter_reduce(1, numbers, scores, "amax")


@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_an_entry(S: int) -> None:
    for position in range(9):
        check(index_select, kernels, (*steps(S, position // 4 + 1, 4, [position], 2, 4, torch.float32), 3, 4, 0.3))


def test_a_cache_shorter_than_the_past() -> None:
    """Numbers from its end to the first new key have no row."""
    q, weights, fresh, cache, position = steps(2, 40, 1, [40], 2, 4, torch.float32)
    (whole,) = call(SCORE, q, weights, fresh, cache, position, RATIO=1, SCALE=0.3)
    (got,) = call(SCORE, q, weights, fresh, cache[:, :33].contiguous(), position, RATIO=1, SCALE=0.3)
    assert torch.equal(got[:, :33], whole[:, :33])
    assert (got[:, 33:] == LOWEST).all()


def test_no_tokens() -> None:
    q, weights, fresh, cache, position = steps(1, 9, 1, [9, 3], 2, 4, torch.float32)
    (got,) = kernels(call, q[:0], weights[:0], fresh, cache, position, 4, 1, 1.0)
    assert got.shape == (0, 4)
    (got,) = kernels(call, q[:0], weights[:0], fresh[:0], cache[:0], position[:0], 4, 1, 1.0)
    assert got.shape == (0, 4)


INFINITY, NAN = float("inf"), float("nan")
BEYOND = [3e38, INFINITY, -INFINITY, NAN, -NAN, LOWEST, 1e-45]
SCORES = {
    "any": lambda: torch.randn(3, 3000),
    "few values": lambda: torch.randint(-2, 3, (3, 3000)).float(),
    "one value": lambda: torch.ones(1, 3000),
    "fewer than wanted": lambda: torch.randn(2, 37),
    "one": lambda: torch.randn(2, 1),
    "none": lambda: torch.randn(2, 0),
    "few seen": lambda: torch.where(torch.rand(3, 2000) < 0.01, torch.randn(3, 2000), LOWEST),
    "none seen": lambda: torch.full((2, 2000), LOWEST),
    "either zero": lambda: torch.where(torch.rand(2, 1500) < 0.5, 0.0, -0.0),
    "neighbours": lambda: (torch.randint(0, 40, (2, 2000), dtype=torch.int32) + 0x3F800000).view(torch.float32),
    "beyond range": lambda: torch.tensor(BEYOND)[torch.randint(0, len(BEYOND), (2, 1500))],
}


@pytest.mark.parametrize("top_k", [5, 512, 3840])
@pytest.mark.parametrize("name", SCORES)
def test_the_best_of_any_scores(name: str, top_k: int) -> None:
    torch.manual_seed(top_k)
    scores = SCORES[name]()
    wanted = best_numbers(scores, torch.arange(scores.shape[1]).expand_as(scores), top_k)
    (got,) = call(TOP_K, scores, TOP=top_k)
    assert torch.equal(got, wanted)


def test_more_than_every_slot() -> None:
    """3840 of 5000, of which many are equal to the last that is taken."""
    scores = torch.randint(0, 9, (1, 5000)).float()
    (got,) = call(TOP_K, scores, TOP=3840)
    assert torch.equal(got, best_numbers(scores, torch.arange(5000)[None], 3840))
