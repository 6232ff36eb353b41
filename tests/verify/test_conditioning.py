"""What limits leave to their factor, the conditioning of sums, beside float64 on the trained example."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from beside_float64 import BesideFloat64, sums_of

from v4export.verify.tolerance import CONFIDENCE


@pytest.mark.slow
def test_the_factor_covers_it(trained_checkpoint: Path) -> None:
    """Many sums cancel; every row's error is within the factor all the same."""
    sums = sums_of(trained_checkpoint, np.random.default_rng(0).integers(3, 300, 90).tolist())
    assert {one.kind for one in sums} == {"matrix", "attention"}
    conditioning, error = (torch.cat([getattr(one, name) for one in sums]) for name in ("conditioning", "error"))
    assert conditioning.median() > 2 and conditioning.min() >= 1 - 1e-6
    assert error.max() < CONFIDENCE
    assert error.square().mean().sqrt() < 1


def test_what_is_counted() -> None:
    """Sums of three terms: an exact one, and many that cancel to a hundredth, some inexact in whichever order."""
    part = torch.arange(1, 67).double() / 67
    cancelling = torch.stack([part, 1 - part, torch.full_like(part, -0.99)], dim=1).float()
    with BesideFloat64() as beside:
        torch.cat([torch.tensor([[1.0, 2.0, 3.0]]), cancelling]) @ torch.ones(3, 1)
    [one] = beside.found
    assert (one.kind, one.terms) == ("matrix", 3)
    expected = torch.tensor([1.0, *[1.99 / 0.01] * 66]).double()
    torch.testing.assert_close(one.conditioning, expected, rtol=1e-4, atol=0)
    assert one.error[0] == 0 and one.error.max() > 1
