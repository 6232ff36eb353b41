"""Kernels, those for GPUs emulated and those for CPUs as they are, beside their ops' eager reference in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import on_cpu
import pytest
import torch
from kernel_comparison import NARROW, compare, widened

from v4export.plugins.kernels.call import call
from v4export.plugins.kernels.emulate import compiler

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
#: Of tests that run kernels in many ways: each is compiled for the CPU first.
emulated = [needs_compiler, pytest.mark.slow]
DTYPES = (torch.float32, *NARROW)


def run_both(
    op: torch.library.CustomOpDef, kernels: Callable[..., Sequence[torch.Tensor]], args: Sequence[Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each output of the kernels, and of the eager reference computed in float32 from the same numbers."""
    got = kernels(call, *args)
    wanted = op(*(widened(arg) for arg in args))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(got) == len(wanted)
    return list(zip(got, wanted, strict=True))


def check(
    op: torch.library.CustomOpDef,
    kernels: Callable[..., Sequence[torch.Tensor]],
    args: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    steps: float = 1.0,
) -> None:
    """Compare every output (``kernel_comparison.compare``).

    Args:
        op: the op, whose arguments ``args`` are.
        kernels: the same as calls of kernels.
        args: tensors and attributes.
        dtype: of the activations.
        steps: how many roundings of half a step there are on the way.
    """
    both = run_both(op, kernels, args)
    for got, wanted in both:
        compare(got, wanted, dtype, steps)
    if on_cpu.has_kernel(op):
        for got, (_, wanted) in zip(on_cpu.run(op, args), both, strict=True):
            compare(got, wanted, dtype, steps)
