"""Kernels on a GPU, by CUDA's driver library alone: compiled at first use for the GPU at hand, then kept."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence

import torch

from v4export.plugins.kernels import nvrtc
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Compilable, Grid, Launch, Parameters

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAX_SHARED_OPTIN = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


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
    handle, most = ctypes.c_int(), ctypes.c_int()
    _checked(_driver().cuInit(0), "starting CUDA")
    _checked(_driver().cuDeviceGet(ctypes.byref(handle), device), f"finding device {device}")
    _checked(
        _driver().cuDeviceGetAttribute(ctypes.byref(most), _MAX_SHARED_OPTIN, handle), "asking for its shared memory"
    )
    return most.value


@functools.cache
def _function(code: bytes, entry: str, shared: int, device: int) -> ctypes.c_void_p:
    """A kernel of machine code or PTX, loaded into the context that PyTorch has made current for the device."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _checked(_driver().cuModuleLoadData(ctypes.byref(module), code), f"loading {entry}")
    _checked(_driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), f"finding {entry}")
    if shared > PLAIN_SHARED:
        asked = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared)
        _checked(asked, f"{entry} asks for {shared} bytes of shared memory")
    return function


@functools.cache
def _compiled(compilable: Compilable, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    code, _ = nvrtc.cubin(compilable, f"sm_{major}{minor}")
    return _function(code, compilable.launch.entry, compilable.launch.shared, device)


def launch(compilable: Compilable, grid: Grid, parameters: Parameters) -> None:
    """Put a kernel on PyTorch's current stream."""
    function = _compiled(compilable, torch.cuda.current_device())
    _put(function, compilable.launch, grid, parameters, torch.cuda.current_stream().cuda_stream)


def launch_text(
    launch: Launch, code: str, dims: Mapping[str, int], sources: Sequence[int], results: Sequence[int], stream: int
) -> None:
    """Put a kernel on a stream from what its node says.

    Args:
        launch: of the node.
        code: its PTX.
        dims: of its inputs.
        sources, results: addresses of inputs and outputs.
        stream: a CUDA stream.
    """
    x, y, z = (blocks.evaluate(dims) for blocks in launch.grid)
    if not (x and y and z):
        return
    function = _function(code.encode() + b"\0", launch.entry, launch.shared, torch.cuda.current_device())
    scalars = [ctypes.c_int(scalar.evaluate(dims)) for scalar in launch.scalars]
    pointers = [[ctypes.c_void_p(address) for address in group] for group in (sources, results)]
    _put(function, launch, (x, y, z), [*pointers[0], *scalars, *pointers[1]], stream)


def _put(function: ctypes.c_void_p, launch: Launch, grid: Grid, parameters: Parameters, stream: int) -> None:
    places = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    _checked(
        _driver().cuLaunchKernel(
            function, *grid, launch.threads, 1, 1, launch.shared, ctypes.c_void_p(stream), places, None
        ),
        f"launching {launch.entry} on a grid of {grid}",
    )
