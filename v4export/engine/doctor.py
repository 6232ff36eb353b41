"""What this machine has, and which stages of v4export will work on it. Nothing heavy is imported, no GPU is touched."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from v4export.engine.backend import cuda_devices, package_version, standard_works
from v4export.engine.targets import buildable
from v4export.precision import PRECISIONS

OK, MISSING, LIMITED = "ok", "missing", "limited"
_GIB = 2**30
_LEAST_MEMORY_GIB, _LEAST_DISK_GIB = 8, 10
_COMPILERS = ("c++", "g++", "clang++", "cl")
_CUDA_EP = "onnxruntime_providers_cuda"


@dataclass(frozen=True)
class Finding:
    """One component or stage.

    Attributes:
        component: its name.
        version: what is installed, or None.
        state: ``ok``, ``missing`` or ``limited``.
        does: what it will do here.
        fix: how to have what is missing; empty when nothing is.
    """

    component: str
    version: str | None
    state: str
    does: str
    fix: str = ""


def diagnose(folder: Path | None = None) -> list[Finding]:
    """Findings about components, then about stages. ``folder``: where output will go, for the disk's free space."""
    return [check() for check in _COMPONENTS] + [_disk(folder or Path.cwd())] + [check() for check in _STAGES]


def _python() -> Finding:
    enough = sys.version_info >= (3, 10)
    return Finding(
        "python", platform.python_version(), OK if enough else LIMITED, "runs v4export", "" if enough else "3.10+"
    )


def _package(name: str, does: str, fix: str) -> Finding:
    version = package_version(name)
    return Finding(
        name,
        version,
        OK if version else MISSING,
        does if version else f"not installed: no {does}",
        "" if version else fix,
    )


def _torch() -> Finding:
    return _package("torch", "reference model and tracing", "pip install torch")


def _polygraphy() -> Finding:
    return _package("polygraphy", "comparison and interchange with its scripts", "pip install 'v4export[rtx]'")


def _executor_version() -> str | None:
    return package_version("onnxruntime_gpu") or package_version("onnxruntime")


def _executor_folder() -> Path | None:
    spec = importlib.util.find_spec("onnxruntime")
    return Path(spec.origin).parent / "capi" if spec and spec.origin else None


def _providers() -> list[str]:
    """Execution providers, from the libraries that are there: importing onnxruntime takes a second."""
    folder = _executor_folder()
    has_cuda = folder is not None and any(folder.glob(f"*{_CUDA_EP}*"))
    return ["CUDA", "CPU"] if has_cuda else ["CPU"]


def _executor() -> Finding:
    version = _executor_version()
    if version is None:
        return Finding("onnxruntime", None, MISSING, "no running or verifying of graphs", "pip install 'v4export[cpu]'")
    return Finding("onnxruntime", version, OK, f"runs and verifies graphs; providers: {', '.join(_providers())}")


def _rtx() -> Finding:
    return _package("tensorrt_rtx", "engine builds without a GPU", "pip install 'v4export[rtx]'")


def _standard() -> Finding:
    version = package_version("tensorrt")
    if version is None:
        does = "not installed: no engines for Hopper and data-centre Blackwell"
        return Finding("tensorrt", None, MISSING, does, "on a machine with such a GPU: pip install 'v4export[gpu]'")
    if standard_works():
        return Finding("tensorrt", version, OK, "engines for the GPU in this machine")
    return Finding(
        "tensorrt", version, LIMITED, "installed, and cannot build here", "it needs a GPU, a driver, all its libraries"
    )


def _nvrtc() -> Finding:
    does = "compiling of kernels for plugins and for PyTorch on a GPU"
    return _package("nvidia_cuda_nvrtc", does, "pip install 'nvidia-cuda-nvrtc>=13.0,<13.1'")


def _device() -> Finding:
    devices = cuda_devices()
    if not devices:
        does = "no CUDA device or driver: everything but running engines works on the CPU"
        return Finding("CUDA device", None, MISSING, does, "an NVIDIA GPU and its driver")
    names = ", ".join(f"{d.name} ({d.capability}, {d.memory_gib:.0f} GiB)" for d in devices)
    return Finding("CUDA device", _driver_version(), OK, f"runs engines: {names}")


def _driver_version() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _compiler() -> Finding:
    path = next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := shutil.which(name))), None
    )
    if path:
        return Finding("C++ compiler", Path(path).name, OK, "fast CPU kernels for onnxruntime, the C++ runner")
    return Finding(
        "C++ compiler", None, MISSING, "onnxruntime runs the portable bodies, which is slower", "install g++ or clang++"
    )


def _cores() -> Finding:
    return Finding("cores", str(os.cpu_count()), OK, "used by tracing, verification and builds")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total, free = memory.total / _GIB, memory.available / _GIB
    does = f"{free:.0f} GiB free; an engine build takes 1 to 2 times the engine's weights"
    few = free < _LEAST_MEMORY_GIB
    return Finding(
        "memory", f"{total:.0f} GiB", LIMITED if few else OK, does, "free memory, or --layers" if few else ""
    )


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / _GIB
    few = free < _LEAST_DISK_GIB
    does = f"{free:.0f} GiB free under {existing}; an engine takes as much as its weights"
    return Finding("disk", f"{free:.0f} GiB", LIMITED if few else OK, does, "free space, or another -o" if few else "")


def _export_stage() -> Finding:
    if package_version("torch") and package_version("onnx"):
        return Finding("stage: export", None, OK, "works here")
    return Finding("stage: export", None, MISSING, "does not work here", "pip install v4export")


def _verify_stage() -> Finding:
    if not _executor_version():
        return Finding("stage: verify", None, MISSING, "does not work here", "pip install 'v4export[cpu]'")
    return Finding("stage: verify", None, OK, f"works here, on {' and '.join(_providers())}")


def _engine_stage() -> Finding:
    present = [device.capability for device in cuda_devices()]
    backend = "tensorrt" if standard_works() else "tensorrt_rtx" if package_version("tensorrt_rtx") else None
    if backend is None:
        return Finding("stage: engine", None, MISSING, "does not work here", "pip install 'v4export[rtx]'")
    can = buildable(backend, present)
    alike: dict[str, list[str]] = {}
    for recipe in PRECISIONS.values():
        alike.setdefault(" ".join(t.name for t in can if t.has(recipe)), []).append(recipe.name)
    by = "; ".join(f"{' '.join(names)}: {targets}" for targets, names in alike.items())
    return Finding("stage: engine", backend, OK, f"builds for {by}")


def _run_stage() -> Finding:
    if not cuda_devices():
        fix = "run the engine on a machine with one of the GPUs it was built for"
        return Finding("stage: run engines", None, MISSING, "does not work here: there is no GPU", fix)
    names = ", ".join(device.capability for device in cuda_devices())
    return Finding("stage: run engines", None, OK, f"works here for engines built for {names}")


_COMPONENTS: tuple[Callable[[], Finding], ...] = (
    _python, _torch, _executor, _rtx, _standard, _polygraphy, _nvrtc, _device, _compiler, _cores, _memory,
)  # fmt: skip
_STAGES: tuple[Callable[[], Finding], ...] = (_export_stage, _verify_stage, _engine_stage, _run_stage)
