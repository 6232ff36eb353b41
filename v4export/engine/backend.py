"""Finds and loads the TensorRT package that will build: ``tensorrt`` or ``tensorrt_rtx``, whose APIs nearly agree.

Without a working driver, the standard package's Builder and Runtime wrap a null pointer and crash the process at the
next call, so nothing here makes one in this process: whether they work is tried in a child.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from v4export.errors import BadInput, NotSupported, missing_package

EXTRAS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}
_SHORT = {"trt": "tensorrt", "rtx": "tensorrt_rtx", "tensorrt-rtx": "tensorrt_rtx"}
_PROBE = "import tensorrt as t; b = t.Builder(t.Logger(t.Logger.ERROR)); b.create_network(0).num_layers; print('works')"
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Backend:
    """A loaded TensorRT package.

    Attributes:
        name: its import name.
        version: its version.
        module: the imported module.
        names_capabilities: whether a build can name the compute capabilities it is for, so that no GPU is needed.
    """

    name: str
    version: str
    module: ModuleType
    names_capabilities: bool


@dataclass(frozen=True)
class Device:
    """A CUDA device of this machine."""

    name: str
    capability: str
    memory_gib: float


@functools.cache
def cuda_devices() -> tuple[Device, ...]:
    """The CUDA devices, asked of the driver library alone; none where there is no driver."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_device(cuda, i) for i in range(count.value))


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return Device(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", memory.value / 2**30)


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None when it is not installed."""
    for distribution in (name, name.replace("_", "-")):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def standard_works() -> bool:
    """Whether ``tensorrt`` has its real library and a device it can build for, tried in a child process."""
    if importlib.util.find_spec("tensorrt") is None or not cuda_devices():
        return False
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and "works" in done.stdout


def choose_backend(prefer: str | None = None, purpose: str = "Building an engine") -> str:
    """The name of the package to use: the one asked for, else ``tensorrt`` where it works, else ``tensorrt_rtx``.

    ``purpose`` is for the error.

    Raises:
        BadInput: ``prefer`` is neither package.
        NotSupported: the package is not installed, or ``tensorrt`` is and cannot work here.
    """
    if prefer is None:
        name = "tensorrt" if standard_works() else "tensorrt_rtx"
    else:
        name = _SHORT.get(prefer.lower(), prefer.lower())
    if name not in EXTRAS:
        raise BadInput(f"No backend is called {prefer!r}", f"known: {', '.join(EXTRAS)}", "Choose one of them.")
    if importlib.util.find_spec(name) is None:
        raise missing_package(name, EXTRAS[name], purpose)
    if name == "tensorrt" and not standard_works():
        raise NotSupported(
            "tensorrt is installed and cannot work here",
            f"CUDA devices: {', '.join(d.name for d in cuda_devices()) or 'none'}",
            "It needs a GPU, its driver and TensorRT's full libraries; --backend tensorrt_rtx builds without them.",
        )
    return name


def load_backend(prefer: str | None = None, purpose: str = "Building an engine") -> Backend:
    """Imports the package ``choose_backend`` names; ``purpose`` is for its error.

    Importing is safe anywhere; making a Builder is left to the build's child process.
    """
    name = choose_backend(prefer, purpose)
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as e:
        raise NotSupported(
            f"{name} is installed and cannot be imported",
            f"{type(e).__name__}: {e}",
            f"Reinstall it: pip install {name}",
        ) from e
    return Backend(name, str(module.__version__), module, hasattr(module, "ComputeCapability"))


def plugin_environment(name: str, folder: Path) -> dict[str, str]:
    """What a process needs so that a parser can make plugins.

    TensorRT-RTX's parser looks for its library by a name without a version, which the wheel does not have, and ends the
    process when there is none. ``folder`` gets a link of that name.
    """
    spec = importlib.util.find_spec(f"{name}_libs")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for library in (found for each in folders for found in Path(each).glob(f"lib{name}.so.*")):
        link = folder / f"lib{name}.so"
        if not link.exists():
            link.symlink_to(library)
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")]))}
