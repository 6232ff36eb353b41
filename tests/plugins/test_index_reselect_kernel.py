"""index_reselect's kernels, emulated, beside the eager reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_checks import DTYPES, check, emulated
from test_index_select import CASES
from test_index_select_kernel import steps

from v4export.plugins.index_reselect.kernel import kernels
from v4export.plugins.index_reselect.op import index_reselect
from v4export.plugins.kernels.call import call

pytestmark = emulated


def with_blocks(args: Sequence[torch.Tensor], blocks: int, size: int) -> list[torch.Tensor]:
    """The op's operands: for each query some blocks in any order, one of them twice, -1 between them."""
    q, weights, fresh, cache, position = args
    count = -(-(cache.shape[1] + fresh.shape[1]) // size)
    chosen = torch.full((len(q), blocks), -1)
    for m in range(len(q)):
        some = torch.randperm(count)[: int(torch.randint(0, min(blocks, count) + 1, ()))]
        chosen[m, torch.randperm(blocks)[: len(some)]] = some
        chosen[m, 0] = chosen[m, -1]
    return [q, weights, fresh, cache, chosen, position]


@pytest.mark.parametrize("blocks", [(2, 3), (9, 4)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_reference(case: tuple, blocks: tuple) -> None:
    S, C, K, ratio, position = case
    torch.manual_seed(C + K)
    args = with_blocks(steps(S, C, ratio, position, 2, 4, torch.float32), *blocks)
    check(index_reselect, kernels, (*args, K, ratio, 0.3, blocks[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 6, 60])
def test_few_blocks_of_many(blocks: int, dtype: torch.dtype) -> None:
    """Most warps have no key to score, and queries that share a warp's keys look in other blocks."""
    torch.manual_seed(blocks)
    args = steps(3, 500, 1, [490, 123], 2, 40, dtype)
    args = with_blocks(args, blocks, 4) if blocks else [*args[:4], torch.empty(6, 0, dtype=torch.int64), args[4]]
    check(index_reselect, kernels, (*args, 300, 1, 0.3, 4), dtype)


def test_keys_of_other_blocks_do_not_matter() -> None:
    args = with_blocks(steps(2, 200, 1, [200], 2, 4, torch.float32), 5, 4)
    wanted = kernels_of(args)
    others = [n for n in range(200) if n // 4 not in args[4]]
    args[3][:, others] = float("nan")
    assert torch.equal(kernels_of(args), wanted)


def test_no_tokens() -> None:
    q, weights, fresh, cache, blocks, position = with_blocks(steps(1, 9, 1, [9, 3], 2, 4, torch.float32), 3, 4)
    assert kernels_of([q[:0], weights[:0], fresh, cache, blocks[:0], position]).shape == (0, 10)


def kernels_of(args: Sequence[Any]) -> torch.Tensor:
    (numbers,) = kernels(call, *args, 300, 1, 0.3, 4)
    return numbers
