"""Sizes of tensors inside the bodies of custom ops, which no graph states and TensorRT meets when it inlines them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from onnx import inliner, shape_inference

from v4export.plugins.limits import MAX_ELEMENTS


def large_tensors(model: onnx.ModelProto) -> Iterator[tuple[str, str, list[int]]]:
    """Tensors of known shape with more than ``MAX_ELEMENTS``: the node whose body has one, its name, its shape.

    Nodes of a kind whose operands have the same shapes share one answer: a model's layers differ in their weights.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    known = _known(model.graph)
    seen = set()
    for node in model.graph.node:
        operands = [known.get(name) for name in node.input]
        signature = (node.domain, node.op_type, *(_key(operand) for operand in operands))
        if (node.domain, node.op_type) not in functions or signature in seen:
            continue
        seen.add(signature)
        for value in _inside(model, node, known):
            shape = _shape(value)
            if shape is not None and math.prod(shape) > MAX_ELEMENTS:
                yield node.name or node.op_type, value.name, shape


def _known(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        values[tensor.name] = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    return values


def _inside(
    model: onnx.ModelProto, node: onnx.NodeProto, known: dict[str, onnx.ValueInfoProto]
) -> Iterator[onnx.ValueInfoProto]:
    """Values of the node's body, typed as far as the shapes of its operands say."""
    inputs = [known[name] for name in dict.fromkeys(node.input) if name in known]
    outputs = [known.get(name) or onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = onnx.helper.make_graph([node], "node", inputs, outputs)
    small = onnx.helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    inferred = shape_inference.infer_shapes(inliner.inline_local_functions(small), data_prop=True)
    yield from inferred.graph.value_info


def _shape(value: onnx.ValueInfoProto) -> list[int] | None:
    """The shape, where every dimension is known."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value for dim in dims] if all(dim.HasField("dim_value") for dim in dims) else None


def _key(value: onnx.ValueInfoProto | None) -> tuple[int, tuple[int | str, ...]] | None:
    if value is None:
        return None
    tensor = value.type.tensor_type
    return tensor.elem_type, tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
