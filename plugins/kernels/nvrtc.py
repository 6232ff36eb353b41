"""Compiles kernels with NVRTC, which needs neither a GPU nor a driver: PTX for whatever GPU, or code for one kind."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from v4export.plugins.kernels.kernel import Compilable
from v4export.plugins.kernels.store import stored

#: Of GPUs from Ampere on: the driver compiles it for the one that it finds.
PTX_TARGET = "compute_80"
# Its own cache, which it has where there is a driver, keeps no log.
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space", "--no-cache")
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SPILLED = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What a thread or a block of compiled code takes.

    Attributes:
        registers: of a thread.
        shared: static bytes of a block.
        stack: bytes of local memory of a thread.
        spilled: bytes that did not fit into registers, stored and loaded.
    """

    registers: int
    shared: int
    stack: int
    spilled: int


class CompileError(RuntimeError):
    """The compiler refused a source; the text is what it said."""


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library: of the package nvidia-cuda-nvrtc, else of an installed CUDA.

    Raises:
        ImportError: there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for found in sorted(Path(root).glob("*/lib/libnvrtc.so.*")):
            # It asks for its other half by name, and is not told where that lies.
            for other in found.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(other))
            return ctypes.CDLL(str(found))
    for name in ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ImportError("Compiling kernels needs NVRTC: pip install 'v4export[gpu]', or nvidia-cuda-nvrtc")


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version; its PTX needs a driver of that CUDA version or later."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def ptx(compilable: Compilable, target: str = PTX_TARGET) -> str:
    """PTX for every GPU from Ampere on, unless a later target is named (``compute_90a``)."""
    return _compiled(compilable, target)[0].rstrip(b"\0").decode()


def cubin(compilable: Compilable, target: str) -> tuple[bytes, Resources]:
    """Machine code for one target (``sm_90a``), and what it takes."""
    code, log = _compiled(compilable, target)
    spills = [int(m["stores"]) + int(m["loads"]) for m in _SPILLED.finditer(log)]
    stacks = [int(m["stack"]) for m in _SPILLED.finditer(log)]
    shared = sum(int(n) for n in _SHARED.findall(log))
    return code, Resources(max(int(m["registers"]) for m in _USED.finditer(log)), shared, max(stacks), max(spills))


def _compiled(compilable: Compilable, target: str) -> tuple[bytes, str]:
    """The code and the compiler's log, kept between runs."""
    options = [*_OPTIONS, f"--gpu-architecture={target}", *(f"-D{name}={value}" for name, value in compilable.defines)]
    source = compilable.source
    key = hashlib.sha256("\0".join([*options, source, str(version())]).encode()).hexdigest()[:32]
    kept = stored(
        f"{compilable.launch.entry}-{target}-{key}", lambda path: path.write_bytes(_compile(compilable, options))
    )
    log, _, code = kept.read_bytes().partition(b"\0")
    return code, log.decode()


def _compile(compilable: Compilable, options: list[str]) -> bytes:
    """The log and the code, a zero byte between them."""
    lib, program = _nvrtc(), ctypes.c_void_p()
    name = f"{compilable.launch.entry}.cu".encode()
    lib.nvrtcCreateProgram(ctypes.byref(program), compilable.source.encode(), name, 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = lib.nvrtcCompileProgram(program, len(options), given)
        log = _taken(lib, program, "ProgramLog").rstrip(b"\0")
        if failed:
            raise CompileError(f"{compilable.kernel.source}, {' '.join(options)}:\n{log.decode()}")
        return log + b"\0" + _taken(lib, program, "PTX" if "=compute" in " ".join(options) else "CUBIN")
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw
