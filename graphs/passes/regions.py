"""Tensors of a file as rows of one initialiser, so that a number known at run time chooses among them.

A file's bytes can be declared again as a matrix whose row length divides the distance between any two of the tensors.
Each tensor is then a run of rows, and ``Gather`` copies that run and no more. Nothing is moved or stacked: the bytes
between the tensors belong to the matrix and are never read. A layer's experts may lie in several files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import Body


@dataclass(frozen=True)
class Region:
    """Where some tensors lie in one file.

    Attributes:
        rows: the file's bytes as an initialiser [rows, row length].
        first: for each tensor, its first row.
        end: for each tensor, the row behind its last; equal to ``first`` where it lies in another file.
    """

    rows: ir.Value
    first: np.ndarray
    end: np.ndarray


def regions(graph: ir.Graph, values: Sequence[ir.Value], dtype: ir.DataType) -> list[Region]:
    """The files that hold ``values``, which are initialisers, declared again with elements of ``dtype``.

    Tensors that are not in files, or do not lie a whole number of elements apart, are copied into the graph.
    """
    found = _in_files(values, dtype)
    if found is None:
        found = _copied(values, dtype)
    for region in found:
        graph.register_initializer(region.rows)
    return found


def take(b: Body, found: Sequence[Region], number: ir.Value) -> ir.Value:
    """The elements, in rows of some length, of the tensor with a number (int64, a scalar)."""
    parts = []
    for region in found:
        first, end = (b.op("Gather", b.const(table), number, axis=0) for table in (region.first, region.end))
        parts.append(b.op("Gather", region.rows, b.op("Range", first, end, b.const(1)), axis=0))
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=0)


def _in_files(values: Sequence[ir.Value], dtype: ir.DataType) -> list[Region] | None:
    tensors = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    if len(tensors) < len(values):
        return None
    files: dict[str, list[int]] = {}
    for number, tensor in enumerate(tensors):
        files.setdefault(str(tensor.path), []).append(number)
    start = np.array([t.offset or 0 for t in tensors], np.int64)
    length = np.array([t.nbytes for t in tensors], np.int64)
    lowest = np.empty_like(start)
    for numbers in files.values():
        lowest[numbers] = start[numbers].min()
    width = math.gcd(*(start - lowest).tolist(), *length.tolist())
    if width % dtype.itemsize:
        return None
    return [
        _region(tensors, np.isin(np.arange(len(tensors)), numbers), start - lowest, length, width, dtype)
        for numbers in files.values()
    ]


def _region(
    tensors: Sequence[ir.ExternalTensor], here: np.ndarray, start: np.ndarray, length: np.ndarray, width: int,
    dtype: ir.DataType,
) -> Region:  # fmt: skip
    front = tensors[int(np.flatnonzero(here)[start[here].argmin()])]
    size = int((start + length)[here].max())
    name = f"{front.name}.and_behind.{dtype.name}"
    shape = ir.Shape([size // width, int(width // dtype.itemsize)])
    rows = ir.ExternalTensor(
        front.location, front.offset, size, dtype, shape=shape, name=name, base_dir=front.base_dir
    )  # fmt: skip
    first = np.where(here, start // width, 0)
    return Region(_value(rows), first, first + np.where(here, length // width, 0))


def _copied(values: Sequence[ir.Value], dtype: ir.DataType) -> list[Region]:
    contents = []
    for value in values:
        assert value.const_value is not None
        contents.append(value.const_value.tobytes())
    length = np.array([len(c) for c in contents], np.int64)
    width = math.gcd(*length.tolist())
    array = np.frombuffer(b"".join(contents), dtype.numpy()).reshape(-1, int(width // dtype.itemsize))
    end = np.cumsum(length // width)
    return [Region(_value(ir.tensor(array, name=f"{values[0].name}.and_others")), end - length // width, end)]


def _value(tensor: ir.ExternalTensor | ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
