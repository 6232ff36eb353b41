"""hash_route's kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check, emulated

from v4export.plugins.hash_route.kernel import kernels
from v4export.plugins.hash_route.op import hash_route
from v4export.plugins.kernels.call import call

pytestmark = emulated
CASES = [
    # M, E, K, V, scoring, norm
    (7, 9, 3, 11, "sqrtsoftplus", True),
    (33, 256, 6, 50, "sqrtsoftplus", True),
    (5, 384, 6, 20, "sigmoid", False),
    (6, 70, 4, 3, "softmax", True),
    (3, 64, 40, 5, "softmax", False),
    (1, 1, 1, 1, "sigmoid", True),
    (0, 16, 2, 4, "sigmoid", True),
]


def operands(M: int, E: int, K: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, a table that names no expert twice, and ids, the last one among them."""
    torch.manual_seed(M + E + K)
    table = torch.stack([torch.randperm(E)[:K] for _ in range(V)])
    ids = torch.randint(0, V, (M,))
    ids[-1:] = V - 1
    return 3 * torch.randn(M, E), table, ids


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case: tuple) -> None:
    *sizes, scoring, norm = case
    check(hash_route, kernels, (*operands(*sizes), scoring, norm, 1.5))


def test_far_logits_keep_their_digits() -> None:
    """softplus of -30 is 9e-14, and 1 + exp(-30) is 1."""
    table, ids = torch.arange(4)[None], torch.zeros(1, dtype=torch.int64)
    weights, _ = kernels(call, torch.full((1, 9), -30.0), table, ids, "sqrtsoftplus", False, 1.0)
    torch.testing.assert_close(weights, torch.full((1, 4), 3.059e-7), rtol=1e-3, atol=0.0)


def test_numbers_that_there_are_none_of_are_the_nearest() -> None:
    """An id that is no token's, or an expert that is none, is not read from anywhere else."""
    logits = torch.arange(18.0).view(2, 9) / 9
    table = torch.tensor([[0, -5], [1, 10**12]])
    weights, indices = kernels(call, logits, table, torch.tensor([-7, 10**12]), "sigmoid", False, 1.0)
    assert indices.tolist() == [[0, 0], [1, 8]]
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, indices))
