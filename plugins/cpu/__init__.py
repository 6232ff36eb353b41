"""Kernels for onnxruntime on a CPU, compiled when first asked for, by and for the machine that they run on.

The same nodes run without them, by their bodies or as ``graphs/lower.py`` rewrites them.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from v4export.plugins.kernels.emulate import compiler
from v4export.plugins.kernels.store import stored

_HERE = Path(__file__).parent
_SOURCES = sorted([*_HERE.glob("*.hpp"), *_HERE.glob("*.cpp")])
#: Of the compiler. GCC takes its own headers' undefined vectors for a mistake.
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
)


@dataclass(frozen=True)
class Target:
    """Machines that kernels are compiled for.

    Attributes:
        name: of the instructions.
        needs: flags of /proc/cpuinfo.
        options: the compiler's.
    """

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]


def _target(name: str, needs: tuple[str, ...]) -> Target:
    """The compiler names instructions as /proc/cpuinfo does, but for underscores."""
    return Target(name, frozenset(needs), tuple(f"-m{one.replace('_', '-')}" for one in needs))


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", *_AVX2[1:])
#: The first whose needs a machine meets is the best for it.
TARGETS = (
    _target("amx", (*_AVX512, "amx_tile", "amx_bf16")),
    _target("avx512", _AVX512),
    _target("avx2", _AVX2),
    _target("generic", ()),
)


@functools.cache
def features() -> frozenset[str]:
    """What this machine's CPU says it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def best_target() -> Target:
    """What to compile for on this machine."""
    return next(target for target in TARGETS if target.needs <= features())


def library(target: Target | None = None) -> Path:
    """The compiled kernels, made if there are none yet, which takes seconds.

    Raises:
        RuntimeError: there is no C++ compiler, or it cannot compile them.
    """
    target = target or best_target()
    text = "\0".join([platform.machine(), *OPTIONS, *target.options, *(path.read_text() for path in _SOURCES)])

    def compile_to(path: Path) -> None:
        found = compiler()
        if found is None:
            raise RuntimeError("no C++ compiler was found: install g++ or clang++, or set CXX")
        command = [found, *OPTIONS, *target.options, str(_HERE / "library.cpp"), "-o", str(path)]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"{found} cannot compile {_HERE / 'library.cpp'}:\n{done.stderr[-4000:]}")

    return stored(f"cpu-{target.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.so", compile_to)
