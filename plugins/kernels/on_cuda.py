"""Makes kernels what custom ops do with CUDA tensors in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from v4export.plugins.kernels.call import call


def register(op: torch.library.CustomOpDef, kernels: Callable[..., tuple[Any, ...]]) -> None:
    """On a GPU, the op is its kernels, compiled when they are first used; elsewhere it stays the eager reference."""

    def on_cuda(*args: Any) -> Any:
        results = kernels(call, *args)
        return results[0] if len(results) == 1 else results

    op.register_kernel("cuda")(on_cuda)


def eager(op: torch.library.CustomOpDef) -> Callable[..., Any]:
    """The op's reference whatever device its tensors are on; new tensors go to PyTorch's default device."""
    return op._init_fn  # type: ignore[no-any-return]
