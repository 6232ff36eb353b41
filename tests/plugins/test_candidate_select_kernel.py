"""candidate_select's kernels, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check, emulated
from test_index_select import CASES
from test_index_select_kernel import steps

from v4export.plugins.candidate_select.kernel import BLOCK_SCORE, kernels
from v4export.plugins.candidate_select.op import candidate_select
from v4export.plugins.kernels.call import call

pytestmark = emulated
# top_blocks, block_size
BLOCKS = [(2, 3), (3, 100)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_reference(case: tuple, blocks: tuple) -> None:
    S, C, K, ratio, position = case
    check(candidate_select, kernels, (*steps(S, C, ratio, position, 2, 4, torch.float32), K, ratio, 0.3, *blocks))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype) -> None:
    args = steps(3, 500, 1, [400, 123], 2, 4, dtype)
    check(candidate_select, kernels, (*args, 3, 1, 0.3, 9, 8), dtype)


@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_a_block(S: int) -> None:
    for position in range(13):
        args = steps(S, position // 3 + 1, 3, [position], 2, 4, torch.float32)
        check(candidate_select, kernels, (*args, 3, 3, 0.3, 2, 3))


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("N", [0, 1, 8, 1029])
def test_the_best_of_each_block(N: int, size: int) -> None:
    """Also of scores below zero; the newest key's block is above all, and there is none before the first key."""
    torch.manual_seed(N)
    scores, position, steps_S = -torch.rand(4, N), torch.tensor([0, 2 * N]), torch.arange(2)
    (got,) = call(BLOCK_SCORE, scores, position, RATIO=3, BLOCK=size)
    newest = ((position[:, None] + steps_S + 1) // 3 - 1).flatten().tolist()
    assert newest[0] == -1
    assert got.shape == (4, -(-N // size))
    for row, best, last in zip(scores, got, newest, strict=True):
        wanted = [part.max().item() for part in row.split(size)] if N else []
        for block in range(len(wanted)):
            if last >= 0 and last // size == block:
                wanted[block] = float("inf")
        assert best.tolist() == wanted


def test_no_tokens() -> None:
    q, weights, fresh, cache, position = steps(1, 9, 1, [9, 3], 2, 4, torch.float32)
    numbers, blocks = kernels(call, q[:0], weights[:0], fresh, cache, position, 3, 1, 0.3, 9, 8)
    assert (numbers.shape, blocks.shape) == ((0, 3), (0, 2))
