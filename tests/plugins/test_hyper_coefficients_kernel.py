"""hyper_coefficients' kernels, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check, emulated
from test_hyper_connection_kernel import EPS, NORM_EPS, operands

from v4export.plugins.hyper_coefficients.kernel import kernels
from v4export.plugins.hyper_coefficients.op import hyper_coefficients
from v4export.plugins.hyper_connection.kernel import kernels as connection
from v4export.plugins.kernels.call import call

pytestmark = emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_reference(dtype: torch.dtype) -> None:
    """Nothing is rounded to the streams' type."""
    check(hyper_coefficients, kernels, (*operands(9, 4, 96, dtype), 20, EPS, NORM_EPS))


@pytest.mark.parametrize("case", [(3, 1, 7), (5, 2, 24), (4, 3, 33), (2, 8, 20)], ids=str)
def test_any_number_of_streams(case: tuple) -> None:
    check(hyper_coefficients, kernels, (*operands(*case, spread=4.0), 5, EPS, NORM_EPS))


@pytest.mark.parametrize("iterations", [1, 2])
def test_first_iterations(iterations: int) -> None:
    check(hyper_coefficients, kernels, (*operands(3, 4, 96, spread=3.0), iterations, 1e-2, 0.5))


def test_they_are_those_of_hyper_connection() -> None:
    args = (*operands(5, 4, 96, torch.bfloat16), 20, EPS, NORM_EPS)
    (_, post, comb), (z, *wanted) = kernels(call, *args), connection(call, *args)
    torch.testing.assert_close([post, comb], wanted, rtol=1e-6, atol=1e-7)
    assert z.dtype == torch.bfloat16


def test_no_token() -> None:
    results = kernels(call, *operands(0, 4, 96), 20, EPS, NORM_EPS)
    assert [tuple(t.shape) for t in results] == [(0, 4), (0, 4), (0, 4, 4)]
