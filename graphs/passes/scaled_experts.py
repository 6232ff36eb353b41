"""Experts in narrow formats, widened when a token has chosen them, for onnxruntime on a CPU.

onnxruntime widens constants when it loads a graph, and would hold every expert as float32. Here a loop over the chosen
experts takes the bytes of one from the checkpoint's file by its number, which is known at run time alone. The node
count does not depend on the number of experts.

Each byte is looked up in a table: onnxruntime's GatherElements does that five times as fast as its Cast from FP8. Of
packed numbers, the two halves of the bytes are the even and the odd columns, and give one product each.

The graph is float32 inside, and rounds what the portable body rounds if that has 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from v4export.graphs.passes.byte_tables import TABLES, shared
from v4export.graphs.passes.regions import Region, regions, take
from v4export.plugins.function_body import Body
from v4export.plugins.moe_experts.onnx import swiglu
from v4export.plugins.round_to_fp8.onnx import rounded
from v4export.plugins.widened import POWERS
from v4export.precision import FORMATS

#: GatherElements shares its work out by rows and wants a table for each.
_ROWS = 64


@dataclass(frozen=True)
class ScaledExperts:
    """A MoeExperts node's matrices.

    Attributes:
        graph: that holds them.
        matrices: E gates, E ups, E downs, initialisers [1, out, in].
        scales: their multipliers, initialisers.
        scales_2: multipliers of these, where they are FP8.
        stored: name of the format.
        block: height and width of a block, 0 being all of a row.
        limit: of SwiGLU.
        dtype: of the activations.
        roundings: scales [E] by which what gates and ups, and what downs multiply is rounded to FP8, if it is.
    """

    graph: ir.Graph
    matrices: Sequence[ir.Value]
    scales: Sequence[ir.Value]
    scales_2: Sequence[ir.Value]
    stored: str
    block: tuple[int, int]
    limit: float
    dtype: ir.DataType
    roundings: Sequence[ir.Value] = ()

    def products(self, b: Body, flat: ir.Value, rows: ir.Value) -> ir.Value:
        """Each row through its expert, float32.

        Args:
            b: gets the nodes.
            flat: experts, int64 [M*K].
            rows: the tokens that chose them [M*K, D], sorted by expert.
        """
        hit, _, _, counts = b.ops("Unique", flat, outputs=4, sorted=1)
        wide = rows if self.dtype == ir.DataType.FLOAT else b.cast(rows, ir.DataType.FLOAT)
        shares = [b.op("SplitToSequence", half, counts, axis=0) for half in self._halves(b, wide)]
        weights = regions(self.graph, self.matrices, ir.DataType.UINT8)
        scale_dtype = self.scales[0].dtype
        assert scale_dtype is not None
        if scale_dtype in TABLES:
            scale_dtype = ir.DataType.UINT8
        scales = regions(self.graph, self.scales, scale_dtype)
        step = ir.Value(name=f"{hit.name}.step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        go = ir.Value(name=f"{hit.name}.go", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        many = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
        done = ir.Value(name=f"{hit.name}.done", type=many)

        def write(inner: Body) -> list[ir.Value]:
            expert = inner.op("Gather", hit, step, axis=0)
            x = [inner.op("SequenceAt", share, step) for share in shares]
            on = inner.op("Identity", go)
            more = inner.op("SequenceInsert", done, self._expert(inner, expert, x, weights, scales))
            on.type, on.shape, more.type = go.type, go.shape, many
            return [on, more]

        empty = b.op("SequenceEmpty", dtype=int(ir.DataType.FLOAT))
        body = b.subgraph("expert", [step, go, done], write)
        results = b.op("Loop", b.op("Size", hit), None, empty, body=body)
        for sequence in (*shares, empty, results):
            sequence.type = many  # onnx_ir's inference takes it for a tensor
        return b.op("ConcatFromSequence", results, axis=0)

    def _expert(
        self, b: Body, expert: ir.Value, x: Sequence[ir.Value], weights: Sequence[Region], scales: Sequence[Region]
    ) -> ir.Value:
        """An expert's rows [n, D] from its tokens', given by halves of columns where the matrices are."""

        def product(part: int, halves: Sequence[ir.Value]) -> ir.Value:
            at = part * len(self.matrices) // 3
            number = b.op("Add", expert, b.const(at))
            grid = self._grid(b, take(b, scales, number), number, at)
            matrix = self._widened(b, take(b, weights, number), grid, at)
            total: tuple[ir.Value, ...] = ()
            for half, w in zip(halves, matrix, strict=True):
                total = (b.op("Gemm", half, w, *total, transB=1),)
            return self._rounded(b, total[0])

        x = [self._as_read(b, half, expert, 0) for half in x]
        h = swiglu(b, product(0, x), product(1, x), ir.DataType.FLOAT, self.limit)
        return product(2, self._halves(b, self._as_read(b, self._rounded(b, h), expert, 1)))

    def _as_read(self, b: Body, rows: ir.Value, expert: ir.Value, which: int) -> ir.Value:
        """Rows as the expert multiplies them."""
        if not self.roundings:
            return rows
        return self._rounded(b, rounded(b, rows, b.op("Gather", self.roundings[which], expert, axis=0)))

    def _halves(self, b: Body, x: ir.Value) -> list[ir.Value]:
        """Even and odd columns, where the matrices are stored so."""
        if len(self._tables) == 1:
            return [x]
        end, axis, step = b.const([np.iinfo(np.int64).max]), b.const([1]), b.const([2])
        return [b.op("Slice", x, b.const([first]), end, axis, step) for first in (0, 1)]

    @property
    def _tables(self) -> tuple[np.ndarray, ...]:
        dtype = self.matrices[0].dtype
        assert dtype is not None
        return TABLES[dtype]

    def _looked_up(self, b: Body, content: ir.Value, name: str, table: np.ndarray) -> ir.Value:
        """Numbers [lines, ..] of bytes [lines, ..] int32."""
        tables = shared(self.graph, f"table.{name}", np.tile(table, (_ROWS, 1)))
        return b.op("GatherElements", tables, content, axis=1)

    def _lines(self, b: Body, content: ir.Value, count: int) -> ir.Value:
        return b.cast(b.reshape(content, math.gcd(_ROWS, count), -1), ir.DataType.INT32)

    def _grid(self, b: Body, content: ir.Value, number: ir.Value, at: int) -> ir.Value:
        """The multipliers of the matrix with a number, float32 on their grid, from their elements."""
        rows, columns = _sizes(self.scales[at])
        if self.scales_2:
            (table,) = TABLES[ir.DataType.FLOAT8E4M3FN]
            wide = self._looked_up(b, self._lines(b, content, rows * columns), "FLOAT8E4M3FN", table)
            values = [value.const_value for value in self.scales_2]
            each = np.array([v.numpy().item() for v in values if v is not None], np.float32)
            return b.reshape(
                b.op("Mul", wide, b.op("Gather", b.const(each, np.float32), number, axis=0)), rows, columns
            )
        if self.scales[0].dtype == ir.DataType.UINT8:
            return b.reshape(
                self._looked_up(b, self._lines(b, content, rows * columns), "FLOAT8E8M0", POWERS), rows, columns
            )
        wide = content if content.dtype == ir.DataType.FLOAT else b.cast(content, ir.DataType.FLOAT)
        return b.reshape(wide, rows, columns)

    def _widened(self, b: Body, content: ir.Value, grid: ir.Value, at: int) -> list[ir.Value]:
        """The matrix [out, in] of some bytes, or its even and its odd columns."""
        out, width = _sizes(self.matrices[at])
        tables = self._tables
        width, columns = width // len(tables), (self.block[1] or width) // len(tables)
        codes = self._lines(b, content, out * width)
        if self.block[0] > 1:
            grid = b.op("Gather", grid, b.const(np.arange(out) // self.block[0]), axis=0)
        whole = width % columns == 0
        if not whole:
            grid = b.op("Gather", grid, b.const(np.arange(width) // columns), axis=1)
        grid = b.op("Unsqueeze", grid, b.const([2]))
        found = []
        for half, table in enumerate(tables):
            numbers = self._looked_up(b, codes, f"{self.matrices[0].dtype.name}.{half}", table)  # type: ignore[union-attr]
            blocks = b.reshape(numbers, out, -1, columns if whole else 1)
            found.append(self._rounded(b, b.reshape(b.op("Mul", blocks, grid), out, width), matrix=True))
        return found

    def _rounded(self, b: Body, value: ir.Value, matrix: bool = False) -> ir.Value:
        """As the activations' type would hold it; eight bits and less times a power of two are a bfloat16 already."""
        exact = matrix and FORMATS[self.stored].power_of_two and self.dtype == ir.DataType.BFLOAT16
        if exact or self.dtype == ir.DataType.FLOAT:
            return value
        return b.cast(b.cast(value, self.dtype), ir.DataType.FLOAT)


def _sizes(matrix: ir.Value) -> list[int]:
    """The last two dimensions."""
    assert matrix.shape is not None
    return [int(d) for d in matrix.shape[-2:]]  # type: ignore[arg-type]
