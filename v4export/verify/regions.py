"""Whether a file that a graph reads experts from by number holds, at each number, that expert's own tensor.

The fast copy declares a file's bytes as one matrix and takes runs of its rows (``v4export/graphs/passes/regions.py``):
where a tensor lies is then said by two tables of row numbers, which are read here out of the nodes that use them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from v4export.checkpoint.tensor import StoredTensor

#: Of a declared region, after the name of its first tensor: in a file, or copied into the graph.
_REGION = re.compile(r"\.and_(behind\.\w+|others)$")
_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)\d+\.\w+?_proj\.weight(?P<scale>.*)$")
_PARTS = ("gate", "up", "down")


def is_region(name: str) -> bool:
    """Whether an initialiser of that name is a file's bytes declared again."""
    return bool(_REGION.search(name))


def region_faults(
    model: onnx.ModelProto, places: Mapping[str, StoredTensor], experts: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    """What is wrong with the places of experts that are read by number, a line each.

    ``experts`` are the numbers of those that a graph has, in order, by the part of their names before these.
    """
    graph = _Graph(model)
    for region in (t for t in model.graph.initializer if is_region(t.name)):
        expert = _EXPERT.match(_REGION.sub("", region.name))
        tables = list(graph.tables(region.name))
        if expert is None or not tables:
            yield f"{region.name} is read in a way that is not known"
            continue
        for first, end in tables:
            if not len(first) == len(end) > 0:
                yield f"{region.name} is read in a way that is not known"
            numbers = experts.get(expert["layer"], ())
            if len(first) != len(numbers) * len(_PARTS):
                yield f"{region.name} has {len(first)} places, and should have {len(numbers) * len(_PARTS)}"
            names = [f"{expert['layer']}{e}.{part}_proj.weight{expert['scale']}" for part in _PARTS for e in numbers][
                : len(first)
            ]
            yield from graph.misplaced(region, first, end, names, places)


class _Graph:
    """The nodes and constants of a graph, those of its branches and loops included."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(_nodes(model.graph))
        self.made = {output: node for node in self.nodes for output in node.output}
        self.kept = {t.name: t for t in model.graph.initializer}

    def tables(self, region: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """First rows, and those behind the last, of the numbered tensors, for each node that takes rows of a region."""
        for node in self.nodes:
            if node.op_type != "Gather" or node.input[0] != region:
                continue
            rows = self.made.get(node.input[1])
            ends = rows.input[:2] if rows is not None and rows.op_type == "Range" else ["", ""]
            first, end = (self._looked_up(name) for name in ends)
            yield first, end

    def _looked_up(self, name: str) -> np.ndarray:
        """The table that a value is taken from; empty where it is not."""
        node = self.made.get(name)
        table = node.input[0] if node is not None and node.op_type == "Gather" else ""
        if table in self.kept:
            return numpy_helper.to_array(self.kept[table])
        values = self.made[table].attribute if table in self.made else []
        return next((numpy_helper.to_array(a.t) for a in values if a.name == "value"), np.empty(0, np.int64))

    def misplaced(
        self, region: onnx.TensorProto, first: np.ndarray, end: np.ndarray, names: list[str],
        places: Mapping[str, StoredTensor],
    ) -> Iterator[str]:  # fmt: skip
        """Tensors that are not where the tables say."""
        where = {entry.key: entry.value for entry in region.external_data}
        content = None if where else np.frombuffer(region.raw_data, np.uint8)
        size = int(where["length"]) if content is None else content.size
        width = size // region.dims[0]
        for number, name in enumerate(names):
            start, stop = int(first[number]) * width, int(end[number]) * width
            stored = places.get(name)
            if stored is None:
                yield f"{region.name} has a place for {name}, which is no tensor of the checkpoint"
            elif content is not None:
                if not np.array_equal(content[start:stop], np.ascontiguousarray(stored.read()).view(np.uint8).ravel()):
                    yield f"{name} is not as the checkpoint has it in {region.name}"
            elif Path(where["location"]).name != stored.file.name:
                if start != stop:
                    yield f"{name} is read from {where['location']}, and lies in {stored.file.name}"
            elif (int(where["offset"]) + start, stop - start) != (stored.offset, stored.nbytes):
                yield f"{name} is read at {int(where['offset']) + start}, and lies at {stored.offset}"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
