"""A kernel as data: its operands, what is compiled into it, and how it is launched.

The parameters of a kernel stand in one order, which TensorRT's ahead-of-time plugins prescribe: inputs, int32 scalars,
outputs. Whatever else a kernel needs to know, a float above all, is a constant of its compilation.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.size import Size, size

#: Shared memory that every launch may have; more has to be asked for, which ahead-of-time plugins cannot.
PLAIN_SHARED = 48 << 10

#: What the sources call a type.
C_TYPES = {
    "float32": "float",
    "float16": "half",
    "bfloat16": "bfloat",
    "int64": "long long",
    "int32": "int",
    "uint8": "unsigned char",
    "float8_e4m3fn": "unsigned char",
    "float4_e2m1": "unsigned char",
}
#: Types that T may be.
ACTIVATIONS = ("float32", "float16", "bfloat16")
_INCLUDE = re.compile(r'^#include "([\w./]+)"\n', re.MULTILINE)

Constant = int | float | str
#: Blocks in x, y and z, and values of a kernel's parameters: what a launch comes to.
Grid = tuple[int, int, int]
Parameters = Sequence[ctypes.c_void_p | ctypes.c_int]


class Unfit(ValueError):
    """A kernel cannot be used for these operands; the text says why."""


@dataclass(frozen=True)
class Typed:
    """A type and the dimensions of one operand; a dimension that a graph leaves open is None."""

    dtype: str
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Operand:
    """Declared as ``name type dim dim ...``; the type T is the activations', and any type where it is a star."""

    name: str
    dtype: str
    dims: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Operand:
        """From its declaration."""
        name, dtype, *dims = text.split()
        return cls(name, dtype, tuple(dims))


@dataclass(frozen=True)
class Launch:
    """How one compiled kernel is launched, in expressions of its inputs' dimensions (``i0.1``: axis 1 of input 0).

    Attributes:
        entry: the kernel's name in the compiled code.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        scalars: the int32 parameters between inputs and outputs.
        grid: blocks in x, y and z.
        outputs: type and dimensions of each.
    """

    entry: str
    threads: int
    shared: int
    scalars: tuple[Size, ...]
    grid: tuple[Size, Size, Size]
    outputs: tuple[tuple[str, tuple[Size, ...]], ...]

    def text(self) -> str:
        """One line a fact: what nodes carry."""
        lines = [f"entry {self.entry}", f"threads {self.threads}", f"shared {self.shared}"]
        lines += [f"scalar {scalar.text()}" for scalar in self.scalars]
        lines += [f"grid {blocks.text()}" for blocks in self.grid]
        lines += [f"output {dtype}: " + ", ".join(d.text() for d in dims) for dtype, dims in self.outputs]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Launch:
        """From ``text``."""
        facts: dict[str, list[str]] = {"scalar": [], "grid": [], "output": []}
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            facts.setdefault(key, []).append(value)
        x, y, z = (Size.parse(value) for value in facts["grid"])
        outputs = []
        for value in facts["output"]:
            dtype, _, dims = value.partition(": ")
            outputs.append((dtype, tuple(Size.parse(d) for d in dims.split(", "))))
        return cls(
            facts["entry"][0],
            int(facts["threads"][0]),
            int(facts["shared"][0]),
            tuple(Size.parse(value) for value in facts["scalar"]),
            (x, y, z),
            tuple(outputs),
        )


@dataclass(frozen=True)
class Compilable:
    """A kernel for operands of known types: its launch, and the definitions its source is compiled with."""

    kernel: Kernel
    launch: Launch
    defines: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """The source with everything it includes."""
        return included(self.kernel.source)


class Sizes(dict[str, Any]):
    """Dimensions, constants and types of a kernel by name, read as attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel.

    Attributes:
        name: the type of its nodes; the entry point has the same name in lower case with underscores.
        source: the ``.cu`` file.
        inputs, outputs: declarations of operands.
        compiled: dimensions that are known when it is compiled, as ``DIM_<name>``.
        scalars: the other dimensions it reads, in the order of its int32 parameters.
        choose: from sizes and types, constants of the compilation: tiles and their like. Its ``budget`` is the shared
            memory a launch may have.
        derived: further dimensions, from those of the inputs.
        grid: blocks in up to three dimensions.
        threads: of a block, from the sizes.
        shared: bytes of dynamic shared memory, from the sizes.
    """

    name: str
    source: Path
    inputs: Sequence[str]
    outputs: Sequence[str]
    compiled: str = ""
    scalars: str = ""
    choose: Callable[[Sizes], Mapping[str, Constant]] = lambda _: {}
    derived: Mapping[str, Callable[[Sizes], Size | int]] = field(default_factory=dict)
    grid: Callable[[Sizes], Sequence[Size | int]] = lambda _: (1,)
    threads: Callable[[Sizes], int] = lambda _: 128
    shared: Callable[[Sizes], int] = lambda _: 0

    @property
    def entry(self) -> str:
        """Name of the entry point."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower()

    def compilable(
        self, operands: Sequence[Typed], constants: Mapping[str, Constant], budget: int = PLAIN_SHARED
    ) -> Compilable:
        """The kernel for these operands.

        Args:
            operands: types of its inputs.
            constants: of the compilation, beside those it chooses itself; TYPE is a T that no input shows.
            budget: bytes of shared memory a launch may have.

        Raises:
            ValueError: operands do not fit the declaration.
            Unfit: a launch would need more shared memory.
        """
        sizes, types = self._bound(operands, Sizes(constants, budget=budget))
        for name in self.compiled.split():
            if isinstance(sizes.get(name), Size):
                raise ValueError(f"{self.name}: {name} must be known when it is compiled")
        chosen = self.choose(sizes)
        sizes.update(chosen)
        for name, rule in self.derived.items():
            sizes[name] = rule(sizes)
        x, y, z = (size(blocks) for blocks in (*self.grid(sizes), 1, 1)[:3])
        outputs = []
        for output in map(Operand.parse, self.outputs):
            dims = tuple(size(int(d) if d.isdigit() else sizes[d]) for d in output.dims)
            outputs.append((types.get(output.dtype, output.dtype), dims))
        scalars = tuple(size(sizes[name]) for name in self.scalars.split())
        launch = Launch(self.entry, self.threads(sizes), self.shared(sizes), scalars, (x, y, z), tuple(outputs))
        if launch.shared > budget:
            raise Unfit(f"{self.name} needs {launch.shared} bytes of shared memory, and a launch may have {budget}")
        dims_compiled = self.compiled.split()
        defines = {f"DIM_{name}": _literal(sizes[name]) for name in dims_compiled}
        defines |= {f"TYPE_{name}": C_TYPES[dtype] for name, dtype in types.items()}
        defines |= {
            k: _literal(v) for k, v in (*constants.items(), *chosen.items()) if k not in (*dims_compiled, "TYPE")
        }
        return Compilable(
            self, launch, tuple(sorted({**defines, "ENTRY": self.entry, **_launch_defines(launch)}.items()))
        )

    def _bound(self, operands: Sequence[Typed], sizes: Sizes) -> tuple[Sizes, dict[str, str]]:
        """Sizes with every dimension of the inputs, and what each type letter stands for."""
        declared = [Operand.parse(text) for text in self.inputs]
        if len(declared) != len(operands):
            raise ValueError(f"{self.name} takes {len(declared)} inputs, not {len(operands)}")
        types = {"T": str(sizes["TYPE"])} if "TYPE" in sizes else {}
        for i, (operand, typed) in enumerate(zip(declared, operands, strict=True)):
            _match(self.name, operand, typed, types)
            for axis, (name, known) in enumerate(zip(operand.dims, typed.dims, strict=True)):
                before = sizes.get(name)
                if isinstance(before, int) and known not in (None, before):
                    raise ValueError(f"{self.name}: {name} is {before} and, in {operand.name}, {known}")
                if known is not None:
                    sizes[name] = known
                elif before is None:
                    sizes[name] = Size(f"i{i}.{axis}")
        sizes.update({f"type_{name}": dtype for name, dtype in types.items()})
        return sizes, types


def _match(name: str, operand: Operand, typed: Typed, types: dict[str, str]) -> None:
    """That an operand is of the declared rank and type; notes what T is."""
    if len(operand.dims) != len(typed.dims):
        raise ValueError(f"{name}: {operand.name} is [{' '.join(operand.dims)}], not {list(typed.dims)}")
    if operand.dtype == "*":
        return
    wanted = operand.dtype
    if wanted == "T":
        wanted = types.setdefault("T", typed.dtype)
        if wanted not in ACTIVATIONS:
            raise ValueError(f"{name}: {operand.name} is {wanted}, not one of {', '.join(ACTIVATIONS)}")
    if typed.dtype != wanted:
        raise ValueError(f"{name}: {operand.name} is {typed.dtype}, not {wanted}")


def _launch_defines(launch: Launch) -> dict[str, str]:
    return {"THREADS": str(launch.threads), "SHARED_SIZE": str(launch.shared)}


def _literal(value: Constant) -> str:
    """A constant as C++ reads it; a float in hexadecimal, so that no digit is lost."""
    return f"({value.hex()}f)" if isinstance(value, float) else str(value)


def included(path: Path, seen: set[Path] | None = None) -> str:
    """A source's text with each file it includes in its place, once."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())

    def text(match: re.Match[str]) -> str:
        inner = (path.parent / match[1]).resolve()
        return "" if inner in seen else included(inner, seen)

    return _INCLUDE.sub(text, path.read_text())
