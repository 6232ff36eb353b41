"""hyper_mix's kernel, emulated, beside the eager reference."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, check, emulated

from v4export.plugins.hyper_mix.kernel import kernels
from v4export.plugins.hyper_mix.op import hyper_mix

pytestmark = emulated


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [(5, 4, 64), (1, 4, 1100), (3, 1, 7), (4, 2, 12), (2, 3, 10), (3, 8, 24), (0, 4, 64)], ids=str
)
def test_it_is_the_reference(case: tuple, dtype: torch.dtype) -> None:
    M, X, D = case
    torch.manual_seed(M + X + D)
    streams, y, post, comb = (torch.randn(shape) for shape in ((M, X, D), (M, D), (M, X), (M, X, X)))
    check(hyper_mix, kernels, (streams.to(dtype), y.to(dtype), post, comb), dtype)
