"""Kernels on a GPU, by CUDA's driver library alone: compiled at first use for the GPU at hand, then kept."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch

from v4export.plugins.kernels import nvrtc
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Compilable

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _checked(failed: int, what: str) -> None:
    if failed:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(failed, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {failed}, {(text.value or b'unknown').decode()}")


@functools.cache
def shared_limit(device: int) -> int:
    """Shared memory that a block may ask for, in bytes."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def _function(compilable: Compilable, device: int) -> ctypes.c_void_p:
    """The loaded kernel. PyTorch has made the device's context current."""
    major, minor = torch.cuda.get_device_capability(device)
    code, _ = nvrtc.cubin(compilable, f"sm_{major}{minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    entry = compilable.launch.entry
    _checked(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {entry}")
    _checked(_driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), f"finding {entry}")
    if compilable.launch.shared > PLAIN_SHARED:
        asked = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, compilable.launch.shared)
        _checked(asked, f"{entry} asks for {compilable.launch.shared} bytes of shared memory")
    return function


def launch(
    compilable: Compilable, grid: tuple[int, int, int], parameters: list[ctypes.c_void_p | ctypes.c_int]
) -> None:
    """Put a kernel on PyTorch's current stream."""
    function = _function(compilable, torch.cuda.current_device())
    places = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    block = (compilable.launch.threads, 1, 1)
    _checked(
        _driver().cuLaunchKernel(function, *grid, *block, compilable.launch.shared, stream, places, None),
        f"launching {compilable.launch.entry} on a grid of {grid}",
    )
