"""What a kernel computed, beside what was wanted: numbers within round-offs, and choices but for ties of rounding."""

from __future__ import annotations

from typing import Any

import torch

NARROW = (torch.float16, torch.bfloat16)
#: Round-offs of float32 that sums in another order may differ by.
WIDE = 16.0


def widened(value: Any) -> Any:
    """The same numbers in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in NARROW else value
    return [widened(one) for one in value] if isinstance(value, list) else value


def compare(
    got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = torch.float32, steps: float = 1.0, wide: float = WIDE
) -> None:
    """Integers are equal; floats are within so many round-offs, of each number and of the largest.

    Args:
        got: the kernel's.
        wanted: the reference's, computed in float32.
        dtype: of the activations; what is float32 whatever they are is held to float32.
        steps: how many roundings of half a step to 16 bits there are on the way.
        wide: how many round-offs of float32.
    """
    assert got.shape == wanted.shape
    if not got.is_floating_point():
        assert torch.equal(got, wanted)
        return
    assert got.dtype in (dtype, torch.float32)
    eps = torch.finfo(got.dtype if got.dtype in NARROW else torch.float32).eps
    limit = 0.51 * eps * steps if got.dtype in NARROW else wide * eps
    top = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got.float(), wanted.float(), rtol=limit, atol=top * limit)


def compare_numbers(got: torch.Tensor, wanted: torch.Tensor, scores: torch.Tensor, wide: float = WIDE) -> None:
    """Chosen numbers of which only those with scores closer than rounding may be others, or in another order.

    Args:
        got: numbers by falling score [M, K], each once; -1 where there are fewer.
        wanted: the same of the reference.
        scores: of every number, float32 [M, N].
        wide: how many round-offs of float32, of the largest score, are rounding.
    """
    assert got.shape == wanted.shape
    assert torch.equal(got < 0, wanted < 0)
    ordered = got.sort(-1).values
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(), "a number stands twice"
    ours, theirs = (scores.gather(1, numbers.clamp(min=0)).masked_fill(wanted < 0, 0) for numbers in (got, wanted))
    finite = theirs[theirs.isfinite()]
    limit = wide * torch.finfo(torch.float32).eps * (float(finite.abs().max()) if finite.numel() else 0.0)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=limit)
