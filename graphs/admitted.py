"""What is proved of a graph's file before a runtime gets it: its size, and that its weights lie where it may read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from v4export.errors import BadInput
from v4export.side_files import file_of, is_inside, read

#: Most bytes of a graph, which has no weights, and most nodes of it and its functions.
MOST_BYTES, MOST_NODES = 1 << 30, 10_000_000


def admit(path: Path) -> None:
    """Look through a graph's file; its weights are not read.

    Raises:
        BadInput: it is gone, too large or no graph, or a weight leads out of its folder or is not there as described.
    """
    try:
        parse_graph(path, read(path, MOST_BYTES))
    except OSError as error:
        raise BadInput(f"cannot read {path}", str(error), "build it again") from error


def parse_graph(path: Path, data: bytes) -> onnx.ModelProto:
    """The graph of the bytes that were read from ``path``, looked through likewise."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own errors have no common base
        raise BadInput(f"cannot read {path}", str(error), "build it again") from error
    for fault in _faults(model, path.parent):
        raise BadInput(f"{path} cannot be used", fault, "build it again")
    return model


def _faults(model: onnx.ModelProto, folder: Path) -> Iterator[str]:
    graphs, nodes = [model.graph], 0
    bodies: list[Any] = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        nodes += len(body.node)
        if nodes > MOST_NODES:
            yield f"it has more than {MOST_NODES} nodes"
            return
        inner = [graph for node in body.node for one in node.attribute for graph in (one.g, *one.graphs)]
        inner = [graph for graph in inner if graph.node or graph.initializer]
        graphs += inner
        bodies += inner
    sizes: dict[str, int | None] = {}
    for graph in graphs:
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield from _misplaced(tensor, folder, sizes)


def _misplaced(tensor: onnx.TensorProto, folder: Path, sizes: dict[str, int | None]) -> Iterator[str]:
    """What is wrong with where a weight lies; ``sizes`` has the bytes of the files that were looked at."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location, numbers = said.get("location", ""), [said.get("offset") or "0", said.get("length") or "0"]
    if not is_inside(location):
        yield f"{tensor.name!r} lies at {location!r}, which leads out of the bundle"
        return
    if location not in sizes:
        file = file_of(folder, location)
        sizes[location] = file.stat().st_size if file else None
    size = sizes[location]
    if size is None:
        yield f"{tensor.name!r} lies in {location!r}, which is not there"
    elif not all(number.isascii() and number.isdecimal() and len(number) < 20 for number in numbers):
        yield f"{tensor.name!r} has no offset and length: {numbers}"
    elif sum(map(int, numbers)) > size:
        yield f"{tensor.name!r} ends at byte {sum(map(int, numbers))}, {location!r} has {size}"
    elif (needed := _bytes(tensor)) != int(numbers[1]):
        yield f"{tensor.name!r} has {numbers[1]} bytes, its shape and type need {needed}"


def _bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes that a shape and a type need; None where they are none."""
    if len(tensor.dims) > 64 or min(tensor.dims, default=0) < 0 or tensor.data_type not in _BITS:
        return None
    bits = _BITS[tensor.data_type]
    for dim in tensor.dims:
        bits *= dim
    return -(-bits // 8)


_BITS = {int(kind): kind.bitwidth for kind in ir.DataType if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING)}
