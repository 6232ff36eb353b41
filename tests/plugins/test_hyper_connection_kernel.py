"""hyper_connection's kernels, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check, emulated

from v4export.plugins.hyper_connection.kernel import PROJECT, kernels
from v4export.plugins.hyper_connection.op import hyper_connection
from v4export.plugins.kernels.call import call

pytestmark = emulated
EPS, NORM_EPS = 1e-6, 1e-5


def operands(M: int, X: int, D: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> list[torch.Tensor]:
    """Streams, fn, base and scale; ``spread`` of the logits that Sinkhorn's iterations start from."""
    torch.manual_seed(M + 10 * X + D)
    rows = (2 + X) * X
    fn = torch.randn(rows, X * D) / (X * D) ** 0.5
    return [torch.randn(M, X, D).to(dtype), fn, torch.randn(rows), torch.tensor([0.5, 1.5, spread])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(9, 4, 96), (17, 4, 6)], ids=str)
def test_it_is_the_reference(case: tuple, dtype: torch.dtype) -> None:
    check(hyper_connection, kernels, (*operands(*case, dtype), 20, EPS, NORM_EPS), dtype)


@pytest.mark.parametrize("case", [(3, 1, 7), (4, 3, 33), (3, 6, 10), (2, 8, 20)], ids=str)
def test_any_number_of_streams(case: tuple) -> None:
    check(hyper_connection, kernels, (*operands(*case, spread=4.0), 5, EPS, NORM_EPS))


@pytest.mark.parametrize("iterations", [1, 2])
def test_first_iterations(iterations: int) -> None:
    check(hyper_connection, kernels, (*operands(3, 4, 96, spread=3.0), iterations, 1e-2, 0.5))


@pytest.mark.parametrize("D", [600, 4100])
def test_a_row_wider_than_a_block_at_a_time(D: int) -> None:
    """The collapse takes one block or several; some threads have no channel."""
    check(hyper_connection, kernels, (*operands(2, 2, D, torch.bfloat16), 3, EPS, NORM_EPS), torch.bfloat16)


def test_streams_of_zeros() -> None:
    streams, *rest = operands(3, 4, 96)
    streams[1] = 0
    check(hyper_connection, kernels, (streams, *rest, 20, EPS, NORM_EPS))


def test_no_token() -> None:
    z, post, comb = kernels(call, *operands(0, 4, 96), 20, EPS, NORM_EPS)
    assert [tuple(t.shape) for t in (z, post, comb)] == [(0, 96), (0, 4), (0, 4, 4)]


def test_few_tokens_are_cut_into_parts() -> None:
    """As many as there are runs of channels for one token, and fewer for many; the sums are those of all channels."""
    for M, wanted in ((1, 9), (264, 4), (3000, 1)):
        streams, fn, *_ = operands(M, 2, 576)
        (partials,) = call(PROJECT, streams, fn)
        assert partials.shape == (M, wanted, 9)
        flat = streams.flatten(1)
        torch.testing.assert_close(partials.sum(1)[:, :8], flat @ fn.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(partials.sum(1)[:, 8], flat.square().mean(1), rtol=1e-5, atol=1e-6)
