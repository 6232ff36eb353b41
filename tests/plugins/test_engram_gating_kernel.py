"""engram_gating's kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, NARROW, check, emulated

from v4export.plugins.engram_gating.kernel import kernels
from v4export.plugins.engram_gating.op import engram_gating

pytestmark = emulated


def operands(M: int, X: int, D: int, dtype: torch.dtype = torch.float32, keep: bool = False) -> list[torch.Tensor]:
    """Streams, keys, value, and the weights of both norms, float32 if these are to be kept."""
    torch.manual_seed(M + X + D)
    shapes = (M, X, D), (M, X, D), (M, D), (X, D), (X, D)
    tensors = [torch.randn(shape) for shape in shapes]
    return [t if keep and i > 2 else t.to(dtype) for i, t in enumerate(tensors)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(5, 4, 64), (3, 1, 1), (2, 2, 42), (0, 4, 64)], ids=str)
def test_it_is_the_reference(case: tuple, dtype: torch.dtype) -> None:
    check(engram_gating, kernels, (*operands(*case, dtype), 1e-5), dtype, steps=1.1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_weights_of_float32(dtype: torch.dtype) -> None:
    check(engram_gating, kernels, (*operands(5, 4, 64, dtype, keep=True), 1e-20), dtype, steps=1.1)


def test_weights_of_two_types() -> None:
    *rest, q_weight, k_weight = operands(3, 2, 24, torch.bfloat16)
    for weights in ((q_weight.float(), k_weight), (q_weight, k_weight.float())):
        check(engram_gating, kernels, (*rest, *weights, 1e-20), torch.bfloat16, steps=1.1)


@pytest.mark.parametrize("D", [700, 2500, 4608])
def test_a_row_wider_than_a_block_at_a_time(D: int) -> None:
    """Whole vectors or not, and threads that have none in the last round."""
    check(engram_gating, kernels, (*operands(2, 2, D), 1e-6))


@pytest.mark.parametrize("eps", [1e-20, 1e-6])
def test_an_eps_next_to_nothing(eps: float) -> None:
    """Small keys are normed, and zeros too, which stay zero: 0 counts as positive."""
    h, k, *rest = operands(4, 2, 32)
    k[:2] *= 1e-8
    k[0, 0] = h[1] = 0
    check(engram_gating, kernels, (h, k, *rest, eps))


def test_large_streams_do_not_overflow() -> None:
    h, k, *rest = operands(4, 2, 32)
    check(engram_gating, kernels, (1e8 * h, 1e8 * k, *rest, 1e-5))
