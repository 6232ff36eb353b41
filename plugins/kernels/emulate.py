"""Kernels on a CPU: the same source, compiled for it with a small emulator in place of CUDA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from v4export.plugins.kernels.kernel import Compilable, Grid, Parameters
from v4export.plugins.kernels.store import stored

_EMULATOR = Path(__file__).with_name("emulated.hpp")
_COMPILERS = ("c++", "g++", "clang++")


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := shutil.which(name))), None
    )


@functools.cache
def _library(compilable: Compilable) -> ctypes.CDLL:
    text = compilable.source + f"\nEMULATE({compilable.launch.entry})\n"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-DEMULATED"]
    options += [f"-D{name}={value}" for name, value in compilable.defines]
    key = hashlib.sha256("\0".join([*options, text, _EMULATOR.read_text()]).encode()).hexdigest()[:32]

    def compile_to(path: Path) -> None:
        found = compiler()
        if found is None:
            raise RuntimeError(
                "No C++ compiler was found to run kernels on the CPU: install g++ or clang++, or set CXX"
            )
        command = [found, *options, "-include", str(_EMULATOR), "-x", "c++", "-", "-o", str(path)]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{compilable.kernel.source} does not compile for the CPU:\n{done.stderr[-4000:]}")

    return ctypes.CDLL(str(stored(f"{compilable.launch.entry}-{key}.so", compile_to)))


def launch(compilable: Compilable, grid: Grid, parameters: Parameters) -> None:
    """Run every block of the grid, one after the other."""
    places = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    shape = (ctypes.c_int * 3)(*grid)
    _library(compilable).launch(shape, compilable.launch.threads, compilable.launch.shared, places)
