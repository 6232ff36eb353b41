"""Whether every weight of a graph file is its own tensor's bytes: exhaustive, where running prompts is not.

An expert that no prompt chooses takes no part in the comparison of numbers, and would hide a wrong reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.tensor import StoredTensor, read_header
from v4export.graphs.weights import Conversion, decide
from v4export.precision import Precision
from v4export.verify.regions import is_region, region_faults

#: Joins the names of matrices that the lowering reads as one.
_JOIN = "+"


@dataclass(frozen=True)
class References:
    """What was checked: how many references, how many converted tensors, and what is wrong, a line each."""

    count: int
    converted: int
    wrong: tuple[str, ...]


def check_references(
    folder: Path, graphs: tuple[str, ...], weights: Mapping[str, Weight], precision: Precision
) -> References:
    """Compare every reference of the graph files with where its tensor lies, and converted bytes with a new conversion.

    Of a converted tensor the first rows are compared, as many as are converted at a time.

    Args:
        folder: of the bundle.
        graphs: names of its ONNX files.
        weights: of the audited checkpoint.
        precision: of the graph.
    """
    kept: dict[str, StoredTensor] = {}
    conversions: dict[str, Conversion] = {}
    for weight in weights.values():
        pointed, converted = decide(weight, precision)
        kept |= dict(pointed)
        conversions |= {c.name: c for c in converted}
    written = {t.name: t for file in folder.glob("weights/converted-*") for t in read_header(file)[1].values()}
    places = kept | written
    wrong = [f"{name}: its bytes are not the checkpoint's" for name, c in conversions.items() if _differs(c, written)]
    count = 0
    for graph in graphs:
        model = onnx.load(folder / graph, load_external_data=False)
        for tensor in _external(model):
            count += 1
            fault = None if is_region(tensor.name) else _fault(tensor, places)
            if fault:
                wrong.append(f"{graph}: {tensor.name} {fault}")
        wrong += [f"{graph}: {fault}" for fault in region_faults(model, places)]
    return References(count, len(conversions), tuple(wrong))


def _external(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    return (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def _fault(tensor: onnx.TensorProto, places: Mapping[str, StoredTensor]) -> str | None:
    where = {entry.key: entry.value for entry in tensor.external_data}
    parts = [places.get(name) for name in tensor.name.split(_JOIN)]
    if None in parts:
        return "is no tensor of the checkpoint"
    first, *rest = (p for p in parts if p is not None)
    end = first.offset + first.nbytes
    for part in rest:
        if part.file != first.file or part.offset != end:
            return "joins tensors that do not lie side by side"
        end += part.nbytes
    if (Path(where["location"]).name, int(where["offset"])) != (first.file.name, first.offset):
        return f"is read from {where['location']} at {where['offset']}, and lies in {first.file.name} at {first.offset}"
    if int(where["length"]) != end - first.offset:
        return f"is read as {where['length']} bytes and has {end - first.offset}"
    # Two packed numbers are one byte: a tensor of pairs and one of bytes are the same, so it is bits that are counted.
    bits = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
    return None if bits == 8 * (end - first.offset) else f"has shape {list(tensor.dims)} and {end - first.offset} bytes"


def _differs(conversion: Conversion, written: Mapping[str, StoredTensor]) -> bool:
    if conversion.name not in written:
        return True
    rows = next(conversion.rows())
    stored = written[conversion.name].part0(0, len(rows)).read()
    return not np.array_equal(stored.view(np.uint8), np.ascontiguousarray(rows).view(np.uint8))
