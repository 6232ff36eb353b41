"""FP8 and packed E2M1 experts, widened when a token has chosen them, for onnxruntime on a CPU.

onnxruntime widens constants when it loads a graph, and would hold every expert as float32. Here a loop over the chosen
experts takes the bytes of one from the checkpoint's file by its number, which is known at run time alone. The node
count does not depend on the number of experts.

Each byte is looked up in a table: onnxruntime's GatherElements does that five times as fast as its Cast from FP8. Of
E2M1, the two halves of the bytes are the even and the odd columns, and give one product each.

The graph is float32 inside, and rounds what the portable body rounds if that has 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from v4export.graphs.passes.regions import Region, regions, take
from v4export.graphs.passes.unpack_fp4 import PAIRS, shared
from v4export.plugins.function_body import Body
from v4export.plugins.moe_experts.onnx import FP4, swiglu

#: Float32 numbers that the bytes of a matrix stand for: one table for FP8, one for each half of a byte of E2M1.
_TABLES = {
    "e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    "e2m1_low": PAIRS[:, 0],
    "e2m1_high": PAIRS[:, 1],
}
#: GatherElements shares its work out by rows and wants a table for each.
_ROWS = 64


@dataclass(frozen=True)
class ScaledExperts:
    """A MoeExperts node's matrices.

    Attributes:
        graph: that holds them.
        matrices: E gates, E ups, E downs, initialisers [1, out, in].
        scales: their multipliers, initialisers.
        stored: ``FP8`` or ``FP4``.
        block: height and width of a block.
        limit: of SwiGLU.
        dtype: of the activations.
    """

    graph: ir.Graph
    matrices: Sequence[ir.Value]
    scales: Sequence[ir.Value]
    stored: str
    block: tuple[int, int]
    limit: float
    dtype: ir.DataType

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
            matrix = self._widened(b, take(b, weights, number), take(b, scales, number), at)
            total: tuple[ir.Value, ...] = ()
            for half, w in zip(halves, matrix, strict=True):
                total = (b.op("Gemm", half, w, *total, transB=1),)
            return self._rounded(b, total[0])

        h = swiglu(b, product(0, x), product(1, x), ir.DataType.FLOAT, self.limit)
        return product(2, self._halves(b, self._rounded(b, h)))

    def _halves(self, b: Body, x: ir.Value) -> list[ir.Value]:
        """Even and odd columns, where the matrices are stored so."""
        if self.stored != FP4:
            return [x]
        end, axis, step = b.const([np.iinfo(np.int64).max]), b.const([1]), b.const([2])
        return [b.op("Slice", x, b.const([first]), end, axis, step) for first in (0, 1)]

    def _widened(self, b: Body, content: ir.Value, scale: ir.Value, at: int) -> list[ir.Value]:
        """The matrix [out, in] with a number, or its even and its odd columns."""
        out, width = _sizes(self.matrices[at])
        names = ("e2m1_low", "e2m1_high") if self.stored == FP4 else ("e4m3",)
        width, columns = width // len(names), self.block[1] // len(names)
        lines = math.gcd(_ROWS, out * width)
        codes = b.cast(b.reshape(content, lines, -1), ir.DataType.INT32)
        scale = scale if scale.dtype == ir.DataType.FLOAT else b.cast(scale, ir.DataType.FLOAT)
        grid = b.reshape(scale, *_sizes(self.scales[at]))
        if self.block[0] > 1:
            grid = b.op("Gather", grid, b.const(np.arange(out) // self.block[0]), axis=0)
        whole = width % columns == 0
        if not whole:
            grid = b.op("Gather", grid, b.const(np.arange(width) // columns), axis=1)
        grid = b.op("Unsqueeze", grid, b.const([2]))
        found = []
        for name in names:
            table = shared(self.graph, f"table.{name}", np.tile(_TABLES[name], (_ROWS, 1)))
            blocks = b.reshape(b.op("GatherElements", table, codes, axis=1), out, -1, columns if whole else 1)
            found.append(self._rounded(b, b.reshape(b.op("Mul", blocks, grid), out, width), matrix=True))
        return found

    def _rounded(self, b: Body, value: ir.Value, matrix: bool = False) -> ir.Value:
        """As the activations' type would hold it; E2M1 times a power of two is a bfloat16 already."""
        if self.dtype == ir.DataType.FLOAT or (matrix and self.stored == FP4 and self.dtype == ir.DataType.BFLOAT16):
            return value
        return b.cast(b.cast(value, self.dtype), ir.DataType.FLOAT)


def _sizes(matrix: ir.Value) -> list[int]:
    """The last two dimensions."""
    assert matrix.shape is not None
    return [int(d) for d in matrix.shape[-2:]]  # type: ignore[arg-type]
