"""Whether every weight of a graph file is its own tensor's bytes: exhaustive, where running prompts is not.

An expert that no prompt chooses takes no part in the comparison of numbers, and would hide a wrong reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.tensor import StoredTensor, read_header
from v4export.graphs.repacked import STEM, possible
from v4export.graphs.shards import Conversion
from v4export.graphs.weights import CONVERTED, as_a_rank_names, as_conversions, decide
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
    folder: Path,
    graphs: Mapping[str, Sequence[Weight]],
    weights: Mapping[str, Weight],
    precision: Precision,
    scales: Mapping[str, np.ndarray] | None = None,
) -> References:
    """Compare every reference of the graph files with where its tensor lies, and converted bytes with a new conversion.

    Of a converted tensor the first rows are compared, as many as are converted at a time; of one that was repacked for
    onnxruntime all of them, with the tensors of the portable graph that it should be made of.

    Args:
        folder: of the bundle.
        graphs: names of its ONNX files, and the weights that each may hold: all, or a rank's pieces.
        weights: of the audited checkpoint.
        precision: of the graph.
        scales: by which inputs are rounded.
    """
    kept: dict[str, StoredTensor] = {}
    conversions = {c.name: c for c in as_conversions(scales or {})}
    for weight in {(w.name, w.piece): w for some in graphs.values() for w in some}.values():
        pointed, converted = decide(weight, precision)
        kept |= dict(pointed)
        conversions |= {c.name: c for c in converted}
    written, repacked = (_in_files(folder, stem) for stem in (CONVERTED, STEM))
    of = {name: "the calibration's" if name in (scales or {}) else "the checkpoint's" for name in conversions}
    wrong = [f"{name}: its bytes are not {of[name]}" for name, c in conversions.items() if _differs(c, written)]
    wrong += _repacked_otherwise(repacked, weights, precision, kept | written)
    every = kept | written | repacked
    count = 0
    for graph, some in graphs.items():
        places = every | as_a_rank_names(every, some)
        model = onnx.load(folder / graph, load_external_data=False)
        for tensor in _external(model):
            count += 1
            fault = None if is_region(tensor.name) else _fault(tensor, places)
            if fault:
                wrong.append(f"{graph}: {tensor.name} {fault}")
        wrong += [f"{graph}: {fault}" for fault in region_faults(model, places, _experts(some))]
    return References(count, len(conversions) + len(repacked), tuple(wrong))


def _experts(weights: Iterable[Weight]) -> dict[str, list[int]]:
    """Numbers of experts in order, by the part of their names before these."""
    found: dict[str, list[int]] = {}
    for weight in weights:
        before, between, behind = weight.name.partition(".experts.")
        number, _, rest = behind.partition(".")
        if between and rest.startswith("gate_proj."):
            found.setdefault(before + between, []).append(int(number))
    return found


def _in_files(folder: Path, stem: str) -> dict[str, StoredTensor]:
    files = sorted(folder.glob(f"weights/{stem}-*.safetensors"))
    return {t.name: t for file in files for t in read_header(file)[1].values()}


def _repacked_otherwise(
    found: Mapping[str, StoredTensor],
    weights: Mapping[str, Weight],
    precision: Precision,
    places: Mapping[str, StoredTensor],
) -> Iterator[str]:
    """What is wrong with tensors that only copies for a CPU read, a line each."""
    wanted = possible(weights, precision) if found else {}
    for name, tensor in found.items():
        one = wanted.get(name)
        if one is None:
            yield f"{name}: the checkpoint has nothing to make it of"
            continue
        made, at = one.rows(lambda source: places[source].read().view(np.uint8).ravel()), tensor.offset
        for rows in made:
            stored = np.fromfile(tensor.file, np.uint8, rows.nbytes, offset=at)
            at += rows.nbytes
            if not np.array_equal(stored, rows.view(np.uint8).ravel()):
                yield f"{name}: its bytes are not those of {one.sources[0][0]} and those that follow"
                break
        if (tensor.shape, tensor.nbytes) != (one.shape, at - tensor.offset):
            yield f"{name} has shape {list(tensor.shape)}, and should have {list(one.shape)}"


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
    rows, tensor = next(conversion.rows()), written[conversion.name]
    stored = (tensor.part0(0, len(rows)) if rows.ndim else tensor).read()
    found, wanted = (np.ascontiguousarray(each).view(np.uint8) for each in (stored, rows))  # one number has no axis
    return not np.array_equal(found, wanted)
