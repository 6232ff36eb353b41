"""The runtime's state for the PyTorch definition: NumPy and PyTorch have no view of each other's E4M3."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch


def held(array: np.ndarray) -> torch.Tensor:
    """A tensor over the same memory."""
    if array.dtype != ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)


def put(room: np.ndarray, new: torch.Tensor) -> None:
    """Write rows of a type that holds them, or of a narrower one."""
    room[:] = new.float().numpy()
