"""A CUDA device as PyTorch has it: memory, one stream that everything is put on, copies, and graphs of what was put.

Everything is asked of PyTorch's tensors, so that the same code runs over those of a CPU, where there is no stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

#: What TensorRT asks of addresses, in bytes.
_ALIGNED = 256
_NUMPY_LACKS = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn)}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """PyTorch's type of the same name."""
    return getattr(torch, dtype.name)


def address(tensor: torch.Tensor) -> int:
    """Where a tensor begins, also if there is nothing in it."""
    return int(tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size())


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers of any type as integers of their width, which every copying operation knows."""
    return tensor.view(_INTEGERS[tensor.element_size()])


class Device:
    """Where tensors lie.

    Args:
        name: as PyTorch has it: ``cuda``, ``cuda:1`` or ``cpu``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # Capturing takes a stream that is not the default one, and TensorRT waits more often on that one.
        self._stream: Any = torch.cuda.Stream(name) if name.startswith("cuda") else None

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.cuda_stream) if self._stream else 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, all that PyTorch does on the device is on the stream, in whatever thread."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory with an address, even for an empty tensor."""
        numbers = int(np.prod(shape))
        return torch.empty(max(numbers, 1), dtype=dtype, device=self.name)[:numbers].view(shape)

    @staticmethod
    def fetch(tensor: torch.Tensor) -> np.ndarray:
        """A copy on the host, which all that was put on the stream has ended for."""
        host = tensor.cpu()
        if tensor.dtype not in _NUMPY_LACKS:
            return host.numpy()
        return host.view(torch.uint8).numpy().view(_NUMPY_LACKS[tensor.dtype])

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What puts all of ``work`` on the stream at once, with the addresses that it has now; it is not done yet.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, as a server has, may go on using the device.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Fed:
    """What the host feeds to a step: arrays behind each other in one allocation, which one copy fills.

    Args:
        device: where it lies.
        arrays: of the shapes and types that every later feed has, too.

    Attributes:
        tensors: them, on the device.
    """

    def __init__(self, device: Device, arrays: Mapping[str, np.ndarray]) -> None:
        self._places: dict[str, slice] = {}
        end = 0
        for name, array in arrays.items():
            self._places[name] = slice(end, end + array.nbytes)
            end += -(-array.nbytes // _ALIGNED) * _ALIGNED
        self._host = np.zeros(max(end, 1), np.uint8)
        self._device = device.empty(self._host.shape, torch.uint8)
        self.tensors = {
            name: self._device[place].view(torch_dtype(arrays[name].dtype)).view(arrays[name].shape)
            for name, place in self._places.items()
        }

    def feed(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put other numbers in their places; those that are not given stay."""
        for name, array in arrays.items():
            self._host[self._places[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        # From pageable memory, so that it may be written over as soon as the call returns.
        self._device.copy_(torch.from_numpy(self._host))
