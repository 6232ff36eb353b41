"""Types and shapes of a graph's values, by ONNX's own inference."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from v4export.plugins.all_reduce.onnx import DOMAIN as SUM_DOMAIN
from v4export.plugins.all_reduce.onnx import OP_TYPE as SUM


def infer_types(model: ir.Model) -> None:
    """Give every value of a graph, and of its branches, the type and shape that follow from its inputs.

    onnx-ir's own pass looks each weight up in the list of inputs, which takes minutes where there are 100,000.
    """
    proto = ir.to_proto(model)
    for weight in proto.graph.initializer:
        del weight.external_data[:]  # a type needs none, and there may be a hundred thousand
    inferred = infer(proto)
    del proto
    found = {value.name: value for graph in _graphs(inferred.graph) for value in (*graph.value_info, *graph.output)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for output in node.outputs:
            proto = found.get(output.name or "")
            if proto is not None and (output.dtype is None or output.shape is None):
                ir.serde.deserialize_value_info_proto(proto, output)


def without_types(model: ir.Model) -> None:
    """Forget types and shapes of values within a graph, which a runtime finds by itself: half the time to write it."""
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = output.shape = None


def infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the types and shapes of all values; a sum over ranks, which ONNX does not know, has its summand's."""
    sums = [i for i, node in enumerate(model.graph.node) if (node.domain, node.op_type) == (SUM_DOMAIN, SUM)]
    _called(model, sums, "", "Identity")
    found = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for one in (model, found):
        _called(one, sums, SUM_DOMAIN, SUM)
    return found


def _called(model: onnx.ModelProto, nodes: Sequence[int], domain: str, op_type: str) -> None:
    for i in nodes:
        model.graph.node[i].domain, model.graph.node[i].op_type = domain, op_type


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(found for one in inner for found in _graphs(one))]
