"""compress_tokens' kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from histories import Past
from kernel_checks import check, emulated

from v4export.plugins.compress_tokens.kernel import kernels
from v4export.plugins.compress_tokens.op import compress_tokens
from v4export.plugins.kernels.call import call

pytestmark = emulated
CASES = [
    # S, ratio, halves, W, position
    (1, 1, 1, 3, [0, 3]),
    (30, 4, 1, 5, [5]),
    (6, 3, 2, 33, [0, 4, 8, 15]),
    (9, 16, 2, 40, [3, 15, 16, 40]),
    (1, 128, 1, 64, [0, 127, 128, 300]),
    (200, 128, 1, 64, [0, 100]),
    (3, 300, 1, 3, [298, 700]),
]


def operands(S: int, ratio: int, halves: int, W: int, position: list[int]) -> tuple:
    """Rows, a ring whose slots that no token is in hold anything, bias and positions."""
    past = Past.of(position, S)
    rows = past.rows(2 * halves * W)
    bias = past.normal(ratio, halves * W)
    arrays = past.new(rows), past.ring(rows, halves * ratio), bias, past.position
    return tuple(map(torch.from_numpy, arrays))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case: tuple) -> None:
    check(compress_tokens, kernels, (*operands(*case), *case[1:3]))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("S", [1, 4, 7])
def test_every_place_in_an_entry(S: int, halves: int) -> None:
    check(compress_tokens, kernels, (*operands(S, 4, halves, 3, list(range(10))), 4, halves))


def test_large_gates_do_not_overflow() -> None:
    rows, ring, *rest = operands(9, 4, 2, 3, [6, 0])
    check(compress_tokens, kernels, (1000 * rows, 1000 * ring, *rest, 4, 2))


def test_what_is_not_a_token_is_not_looked_at() -> None:
    """Slots of the ring that no token is in, and of tokens to come, may hold what is no number."""
    rows, ring, bias, position = operands(2, 4, 2, 3, [1, 0])
    ring[0, 1:] = ring[1] = float("nan")
    (entries,) = kernels(call, rows, ring, bias, position, 4, 2)
    assert entries.isfinite().all()


def test_no_sequence() -> None:
    (entries,) = kernels(call, *(t[:0] if i != 2 else t for i, t in enumerate(operands(9, 4, 2, 3, [6]))), 4, 2)
    assert entries.shape == (0, 3, 3)


def test_no_token() -> None:
    rows, *rest = operands(1, 4, 2, 3, [6])
    (entries,) = kernels(call, rows[:, :0], *rest, 4, 2)
    assert entries.shape == (1, 0, 3)
