"""Matrices as a file has them, found behind what widens them in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from v4export.graphs.passes.declared_again import declared_again
from v4export.graphs.passes.neighbours import made_by
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE

PACKED = ir.DataType.FLOAT4E2M1
#: Types that kernels for a CPU widen by themselves; those that need no multipliers.
PLAIN = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
STORED = (*PLAIN, ir.DataType.FLOAT8E4M3FN, PACKED)


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [N, K].

    Attributes:
        operands: the initialiser, its multipliers, and theirs.
        block: rows and columns that share a multiplier.
    """

    operands: tuple[ir.Value, ...]
    block: tuple[int, int] = (0, 0)

    @property
    def attributes(self) -> dict[str, int]:
        """What a kernel's node says of it."""
        assert self.operands[0].shape is not None
        out, width = map(int, self.operands[0].shape)  # type: ignore[arg-type]
        return {"out": out, "width": width, "rows": self.block[0], "columns": self.block[1]}

    def read_by(self, graph: ir.Graph) -> Sequence[ir.Value]:
        """The operands as a kernel is given them."""
        return [readable(graph, self.operands[0]), *self.operands[1:]]


def stored_matrix(value: ir.Value | None) -> StoredMatrix | None:
    """What a value is a stored matrix's widened form of, or that matrix itself."""
    if value is None:
        return None
    cast = made_by(value, "Cast")
    before = cast.inputs[0] if cast and value.dtype == ir.DataType.FLOAT else None
    if before is not None and before.dtype in PLAIN:
        value = before
    if value.is_initializer():
        return StoredMatrix((value,)) if value.dtype in STORED else None
    found = _dequantized(value)
    if found is None:
        return None
    matrix, scale, block = found
    outer = _dequantized(scale)
    operands = (matrix, scale) if outer is None else (matrix, *outer[:2])
    return StoredMatrix(operands, block) if matrix.dtype in STORED and matrix.is_initializer() else None


def _dequantized(value: ir.Value) -> tuple[ir.Value, ir.Value, tuple[int, int]] | None:
    node = made_by(value, BLOCK_DEQUANTIZE)
    if node is None:
        return None
    matrix, scale = node.inputs
    rows, columns = node.attributes["block_shape"].as_ints()
    assert matrix is not None and scale is not None
    return matrix, scale, (rows, columns)


def readable(graph: ir.Graph, matrix: ir.Value) -> ir.Value:
    """A matrix as onnxruntime can hold it: packed numbers as bytes."""
    if matrix.dtype != PACKED:
        return matrix
    assert matrix.shape is not None
    *outer, columns = (int(d) for d in matrix.shape)  # type: ignore[arg-type]
    return declared_again(matrix, graph, ir.DataType.UINT8, [*outer, columns // 2])
