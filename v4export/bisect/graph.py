"""A graph of which pieces are run: what is between some values and others. Weights stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from v4export.graphs.split import called, reads

Arrays = Mapping[str, np.ndarray]
#: Runs a graph over its inputs.
Run = Callable[[Arrays], dict[str, np.ndarray]]
#: Makes a graph ready to run.
Execute = Callable[[onnx.ModelProto], Run]


class Graph:
    """An ONNX graph, and what runs its pieces.

    Args:
        model: the graph, weights not loaded.
        execute: makes a piece of it ready to run.
        folder: that its weights lie in, or below.

    Attributes:
        nodes: in an order in which they can be computed.
        maker: the number of the node that makes a value, by the value's name.
        reads: for each node the names of what it reads, its subgraphs included.
        inputs, outputs: names.
        kept: initialisers by name.
    """

    def __init__(self, model: onnx.ModelProto, execute: Execute, folder: Path) -> None:
        graph = model.graph
        self.model, self.folder, self.execute = model, folder, execute
        self.nodes = list(graph.node)
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.reads = [tuple(dict.fromkeys(reads(node))) for node in self.nodes]
        self.kept = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in self.kept]
        self.outputs = [value.name for value in graph.output]
        self._types = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
        self._ready: dict[tuple[object, ...], Run] = {}

    def needed(self, targets: Iterable[str], known: Callable[[str], bool]) -> tuple[list[int], list[str]]:
        """Numbers of the nodes that compute ``targets``, and names of what they read that is ``known`` or an input."""
        nodes: set[int] = set()
        given: dict[str, None] = {}
        ahead, seen = list(targets), set()
        while ahead:
            name = ahead.pop()
            if name in seen:
                continue
            seen.add(name)
            if known(name) or name in self.inputs:
                given[name] = None
            elif name in self.maker and self.maker[name] not in nodes:
                nodes.add(self.maker[name])
                ahead.extend(self.reads[self.maker[name]])
        return sorted(nodes), sorted(given)

    def piece(self, targets: Sequence[str], given: Arrays) -> onnx.ModelProto:
        """The graph from the values that are ``given`` to its ``targets``; of arrays only types and axes matter."""
        numbers, names = self.needed(targets, given.__contains__)
        read = {name for i in numbers for name in self.reads[i]}
        graph = onnx.GraphProto(name="piece", node=[self.nodes[i] for i in numbers])
        graph.input.extend(
            helper.make_tensor_value_info(n, int(self.dtype(n, given[n].dtype)), [None] * given[n].ndim) for n in names
        )
        graph.output.extend(self._typed(name) for name in targets)
        inside = {name for i in numbers for name in self.nodes[i].output if name} - set(targets)
        graph.value_info.extend(self._typed(name) for name in sorted(inside & self._types.keys()))
        graph.initializer.extend(self.kept[name] for name in sorted(read & self.kept.keys()))
        model = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import, graph=graph)
        # Which functions are called is found among all of them.
        model.functions.extend(self.model.functions)
        used = called(model)
        del model.functions[:]
        model.functions.extend(f for f in self.model.functions if (f.domain, f.name, f.overload) in used)
        return model

    def _typed(self, name: str) -> onnx.ValueInfoProto:
        """A value with its type, where that is known; shapes are the piece's own."""
        value = onnx.ValueInfoProto(name=name)
        declared = self._types[name].type.tensor_type.elem_type if name in self._types else 0
        if declared:
            value.type.tensor_type.elem_type = declared
        return value

    def dtype(self, name: str, otherwise: np.dtype) -> ir.DataType:
        """The type that a value has here, as far as the graph says so."""
        declared = self._typed(name).type.tensor_type.elem_type
        return ir.DataType(declared) if declared else ir.DataType.from_numpy(otherwise)

    def values(self, targets: Sequence[str], given: Arrays) -> dict[str, np.ndarray]:
        """Compute ``targets`` from the values that are ``given``, each of which is taken to have its type here."""
        found = {name: given[name] for name in targets if name in given}
        wanted = tuple(name for name in targets if name not in given)
        if not wanted:
            return found
        names = self.needed(wanted, given.__contains__)[1]
        inputs = {n: given[n].astype(self.dtype(n, given[n].dtype).numpy(), copy=False) for n in names}
        key = (wanted, *((name, array.dtype, array.ndim) for name, array in inputs.items()))
        if key not in self._ready:
            self._ready[key] = self.execute(self.piece(wanted, inputs))
        return found | self._ready[key]({name: np.ascontiguousarray(array) for name, array in inputs.items()})
