"""moe_route's kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import check, needs_compiler

from v4export.plugins.moe_route.kernel import kernels
from v4export.plugins.moe_route.op import moe_route

pytestmark = needs_compiler
CASES = [
    # M, E, K, groups, open, scoring, group score, norm
    (7, 16, 4, 4, 2, "sigmoid", "top2_sum", True),
    (5, 64, 6, 1, 1, "softmax", "max", False),
    (3, 10, 3, 5, 2, "softmax", "max", True),
    (33, 256, 8, 8, 4, "sigmoid", "top2_sum", True),
    (4, 384, 8, 1, 1, "sqrtsoftplus", "max", True),
    (0, 16, 2, 1, 1, "sigmoid", "max", True),
    (1, 3, 3, 1, 1, "sqrtsoftplus", "max", False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_reference(case: tuple) -> None:
    M, E, K, groups, opened, scoring, group_score, norm = case
    torch.manual_seed(M + E)
    logits, bias = 3 * torch.randn(M, E), 0.3 * torch.randn(E)
    check(moe_route, kernels, (logits, bias, K, scoring, groups, opened, group_score, norm, 2.5))


def test_of_equal_scores_the_lower_number_is_taken() -> None:
    _, indices = kernels_of(torch.zeros(2, 64))
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_far_logits_keep_their_digits() -> None:
    """softplus of -30 is 9e-14, and 1 + exp(-30) is 1."""
    weights, _ = kernels_of(torch.full((1, 64), -30.0), "sqrtsoftplus")
    torch.testing.assert_close(weights, torch.full((1, 4), 3.059e-7), rtol=1e-3, atol=0.0)


def kernels_of(logits: torch.Tensor, scoring: str = "sigmoid") -> tuple[torch.Tensor, torch.Tensor]:
    from v4export.plugins.kernels.call import call

    return kernels(call, logits, torch.zeros(logits.shape[1]), 4, scoring, 1, 1, "max", False, 1.0)
