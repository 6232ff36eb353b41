"""engram_conv's kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from histories import Past
from kernel_checks import DTYPES, NARROW, check, emulated

from v4export.plugins.engram_conv.kernel import kernels
from v4export.plugins.engram_conv.op import engram_conv
from v4export.plugins.kernels.call import call

pytestmark = emulated


def operands(S: int, K: int, dilation: int, P: int, position: list[int]) -> list[torch.Tensor]:
    """Rows, a ring whose slots that no token is in hold anything, taps and positions."""
    past = Past.of(position, S)
    rows = past.rows(P)
    return [torch.from_numpy(a) for a in (past.new(rows), past.ring(rows, (K - 1) * dilation), past.normal(P, K))] + [
        torch.from_numpy(past.position)
    ]


@pytest.mark.parametrize("S", [1, 4, 20])
def test_every_slot_of_the_ring(S: int) -> None:
    check(engram_conv, kernels, (*operands(S, 4, 3, 8, list(range(15))), 3))


@pytest.mark.parametrize(
    "case",
    [(1, 2, 1, 7, [0, 3]), (30, 2, 5, 6, [4]), (6, 3, 2, 515, [0, 3, 4, 15]), (17, 9, 1, 4, [0, 8, 40])],
    ids=str,
)
def test_it_is_the_reference(case: tuple) -> None:
    check(engram_conv, kernels, (*operands(*case), case[2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types(dtype: torch.dtype) -> None:
    *floats, position = operands(10, 4, 3, 24, [0, 2, 9, 31])
    check(engram_conv, kernels, (*(t.to(dtype) for t in floats), position, 3), dtype, steps=1.1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("wide", [("ring",), ("weight",), ("ring", "weight")], ids=str)
def test_a_ring_or_taps_of_float32(wide: tuple[str, ...], dtype: torch.dtype) -> None:
    rows, ring, weight, position = operands(5, 3, 2, 6, [0, 3, 15])
    ring, weight = (t if name in wide else t.to(dtype) for name, t in (("ring", ring), ("weight", weight)))
    check(engram_conv, kernels, (rows.to(dtype), ring, weight, position, 2), dtype, steps=1.1)


def test_slots_that_no_token_is_in_are_not_looked_at() -> None:
    rows, ring, weight, position = operands(5, 4, 3, 8, [2])
    ring[:, 2:] = float("nan")
    (out,) = kernels(call, rows, ring, weight, position, 3)
    assert out.isfinite().all()


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0)])
def test_nothing(B: int, S: int) -> None:
    rows, ring, weight, position = operands(5, 4, 3, 8, [2, 7])
    (out,) = kernels(call, rows[:B, :S], ring[:B], weight, position[:B], 3)
    assert out.shape == (B, S, 8)
