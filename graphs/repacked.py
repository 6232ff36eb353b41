"""Integer matrices as onnxruntime's kernels for a CPU read them: unsigned, with float32 multipliers, experts in stacks.

The portable graph has signed numbers and bfloat16 multipliers, one matrix an expert, as TensorRT wants them. So a copy
for a CPU has weights of its own, ``OUT/weights/cpu-*.safetensors``. They are made expert by expert, so memory does not
depend on the model, and written once for all graphs of a bundle.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.names import SCALE
from v4export.graphs.shards import Conversion, Placed, write
from v4export.precision import MULTIPLIED_IN_PARTS, Format, Precision
from v4export.units import Units, content

#: How the names of the files begin.
STEM = "cpu"
#: The only width of blocks that formats of integers have.
COLUMNS = 32
#: Formats of which there are kernels: bits of a number by the format's name.
BITS = {"int4": 4, "int8": 8}
#: What the names of repacked numbers and multipliers end in, behind those of a matrix or a stack.
NUMBERS, MULTIPLIERS = ".unsigned", SCALE + ".float32"

#: The highest bit of every number in a byte. Turned over, it adds half their range to numbers in two's complement.
_HIGHEST = {4: np.uint8(0x88), 8: np.uint8(0x80)}
_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)\d+\.(gate|up|down)_proj\.weight$")

#: The stored bytes of a tensor, by its name.
Read = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Repacked:
    """A tensor made of stored ones.

    Attributes:
        name: of its own.
        shape: in numbers of ``dtype``.
        sources: names of stored tensors. Groups follow each other; the rows of a group's tensors take turns.
        height: rows of a stored tensor.
        bits: of a number; None where these are multipliers.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...]
    height: int
    bits: int | None

    @property
    def dtype(self) -> str:
        """Numbers are bytes of one or two."""
        return "float32" if self.bits is None else "uint8"

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * (4 if self.bits is None else 1)

    def rows(self, read: Read) -> Iterator[np.ndarray]:
        """Its rows in order, a group at a time."""
        for group in self.sources:
            parts = [self._repacked(read(name)) for name in group]
            yield np.stack(parts, axis=1).reshape(len(group) * self.height, -1)

    def _repacked(self, content: np.ndarray) -> np.ndarray:
        if self.bits is None:
            return content.view(ml_dtypes.bfloat16).astype(np.float32).reshape(self.height, -1)
        return content.reshape(self.height, -1) ^ _HIGHEST[self.bits]


def linear(name: str, bits: int, rows: int, width: int) -> tuple[Repacked, Repacked]:
    """Numbers [N, K/32, bytes] and multipliers [N, K/32] of a matrix, as ``MatMulNBits`` takes them."""
    blocks = width // COLUMNS
    return (
        Repacked(name + NUMBERS, (rows, blocks, COLUMNS * bits // 8), ((name,),), rows, bits),
        Repacked(name + MULTIPLIERS, (rows, blocks), ((name + SCALE,),), rows, None),
    )


def stacks(
    layer: str, parts: Sequence[Sequence[str]], bits: int, inner: int, width: int
) -> tuple[Repacked, Repacked, Repacked, Repacked]:
    """Numbers and multipliers of gate and up [E, 2F, ..], and of down [E, D, ..], as ``QMoE`` takes them.

    Args:
        layer: what the names of its experts begin with.
        parts: names of E gates, of E ups, and of E downs.
        bits: of a number.
        inner: F.
        width: D.
    """
    gate, up, down = parts

    def stack(name: str, groups: Sequence[tuple[str, ...]], height: int, columns: int) -> tuple[Repacked, Repacked]:
        shape = len(groups), len(groups[0]) * height
        scales = tuple(tuple(one + SCALE for one in group) for group in groups)
        return (
            Repacked(name + NUMBERS, (*shape, columns * bits // 8), tuple(groups), height, bits),
            Repacked(name + MULTIPLIERS, (*shape, columns // COLUMNS), scales, height, None),
        )

    both = stack(f"{layer}gate_up_proj.weight", list(zip(gate, up, strict=True)), inner, width)
    return (*both, *stack(f"{layer}down_proj.weight", [(one,) for one in down], width, inner))


def layer_of(expert: str) -> str | None:
    """What the names of a layer's experts begin with, of the name of one of their matrices."""
    found = _EXPERT.match(expert)
    return found["layer"] if found else None


def possible(weights: Mapping[str, Weight], precision: Precision) -> dict[str, Repacked]:
    """Everything that copies for a CPU may have repacked, by name, as the checkpoint says it and no graph."""
    found: list[Repacked] = []
    layers: dict[str, Format] = {}
    for name, weight in weights.items():
        format = precision.format_of(name, weight.role)
        if format.name in BITS:
            layer = layer_of(name)
            if layer is None:
                found += linear(name, BITS[format.name], *weight.shape)
            else:
                layers[layer] = format
    for layer, format in layers.items():
        count = sum(name.startswith(layer) and name.endswith(".down_proj.weight") for name in weights)
        parts = [[f"{layer}{e}.{part}_proj.weight" for e in range(count)] for part in ("gate", "up", "down")]
        found += stacks(layer, parts, BITS[format.name], *weights[parts[0][0]].shape)
    return {one.name: one for one in found}


def wanted(weights: Mapping[str, Weight], precision: Precision) -> dict[str, Repacked]:
    """Those of ``possible`` that the passes will want: matrices that are cut up before they multiply stay widened."""

    def whole(one: Repacked) -> bool:
        module = one.name.partition(".weight")[0].rpartition(".")[2]
        return module not in MULTIPLIED_IN_PARTS

    return {name: one for name, one in possible(weights, precision).items() if whole(one)}


class Repacking:
    """Collects what graphs want repacked, and writes it."""

    def __init__(self) -> None:
        self._conversions: dict[str, Conversion] = {}
        self._values: list[ir.Value] = []

    def value(self, graph: ir.Graph, one: Repacked) -> ir.Value:
        """The graph's initialiser that is to hold it; ``write`` says where. Sources are initialisers of the graph."""
        if one.name in graph.initializers:
            return graph.initializers[one.name]
        if one.name not in self._conversions:
            files = {source: _external(graph, source) for group in one.sources for source in group}
            self._conversions[one.name] = Conversion(
                one.name,
                one.dtype,
                one.shape,
                lambda: one.rows(lambda source: _bytes(files[source])),
                lambda: (one, [_content(file) for file in files.values()]),
            )
        later = _lies(Placed(one.name, "", 0, 0, one.dtype, one.shape))
        kind = ir.TensorType(later.dtype)
        value = ir.Value(name=one.name, const_value=later, shape=ir.Shape(one.shape), type=kind)
        graph.register_initializer(value)
        self._values.append(value)
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(c.nbytes for c in self._conversions.values())

    def write(self, out: Path, advance: Callable[[float], None] = lambda _: None, units: Units | None = None) -> None:
        """Write all of it into ``out/weights``, and point the graphs at it."""
        placed = write(list(self._conversions.values()), units or Units(out), STEM, advance)
        for value in self._values:
            assert value.name is not None
            value.const_value = _lies(placed[value.name], out)


def _lies(placed: Placed, base: Path = Path()) -> ir.ExternalTensor:
    dtype = {"uint8": ir.DataType.UINT8, "float32": ir.DataType.FLOAT}[placed.dtype]
    return ir.ExternalTensor(
        placed.location, placed.offset, placed.nbytes, dtype, shape=ir.Shape(placed.shape), name=placed.name,
        base_dir=base,
    )  # fmt: skip


def _external(graph: ir.Graph, name: str) -> ir.ExternalTensor:
    tensor = graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


def _bytes(tensor: ir.ExternalTensor) -> np.ndarray:
    """By one plain read: a mapping for each of ten thousand tensors would run out of file descriptors."""
    return np.fromfile(tensor.path, np.uint8, tensor.length or -1, offset=tensor.offset or 0)


def _content(tensor: ir.ExternalTensor) -> str:
    offset = tensor.offset or 0
    return content(Path(tensor.path), offset, tensor.length or os.path.getsize(tensor.path) - offset)
