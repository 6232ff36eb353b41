"""Experts as one Gemm each over the tokens that chose them, for onnxruntime on a CPU.

Tokens are sorted by expert and split by count; an expert that nobody chose gets a Gemm of zero rows, which costs about
a microsecond. Each Gemm reads the expert's own matrix [out, in] where it lies in the checkpoint's file: no stack, no
copy. Gate and up are one matrix where the file has them side by side, which spares E Gemms a layer and one part in
twenty of a token's time. Against the portable body, which stacks and gathers, a single token takes as long, 16 tokens a
third, and 128 tokens a seventh of the time; the session loads in a twentieth (``docs/benchmarks.md``).

Experts in a narrow format are left to ``scaled_experts``, which widens those that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from v4export.graphs.passes.adjacent import joined
from v4export.graphs.passes.replaced import replace
from v4export.graphs.passes.scaled_experts import ScaledExperts
from v4export.plugins.function_body import Body
from v4export.plugins.moe_experts.onnx import PLAIN, input_scales, operands_of, swiglu


def group_experts(model: ir.Model, wanted: Callable[[ir.Node], bool] = lambda _: True) -> bool:
    """Replace every MoeExperts node that is wanted in place; whether there was any."""
    nodes = [node for node in model.graph if node.op_type == "MoeExperts" and wanted(node)]
    for node in nodes:
        body = Body(f"{node.name}.")
        y = _grouped(body, node, model.graph)
        replace(model.graph, node, [node], body.nodes, node.outputs, [y])
    for key in [key for key in model.functions if key[:2] == ("v4", "MoeExperts")]:
        model.functions.pop(key)
    return bool(nodes)


def _grouped(b: Body, node: ir.Node, graph: ir.Graph) -> ir.Value:
    x, weights, indices, *operands = (v for v in node.inputs if v is not None)
    flat = b.reshape(indices, -1)
    slots = b.dim(flat, 0)
    _, order = b.ops("TopK", flat, slots, outputs=2, axis=0, largest=0, sorted=1)
    per_token = b.dim(indices, 1)
    rows = b.op("Gather", x, b.op("Div", order, per_token), axis=0)
    sorted_y = _sorted_products(b, node, flat, rows, operands, graph)
    back = b.op("ScatterElements", order, order, b.arange(slots), axis=0)
    y = b.reshape(b.op("Gather", sorted_y, back, axis=0), b.dim(x, 0), per_token, _width(node))
    mixed = b.op("Squeeze", b.op("MatMul", b.op("Unsqueeze", weights, b.const([1])), y), b.const([1]))
    return b.cast(mixed, _dtype(node))


def _sorted_products(
    b: Body, node: ir.Node, flat: ir.Value, rows: ir.Value, operands: Sequence[ir.Value], graph: ir.Graph
) -> ir.Value:
    """Rows [M*K, D], sorted by expert, each through its expert: float32 [M*K, D]."""
    a = node.attributes
    count, stored, limit = a["num_experts"].as_int(), a["format"].as_string(), a["limit"].as_float()
    operands = operands[: 3 * count * operands_of(stored)]
    matrices, scales, scales_2 = (operands[i * 3 * count : (i + 1) * 3 * count] for i in range(3))
    if stored != PLAIN:
        block = a["rows"].as_int(), a["columns"].as_int()
        how = (stored, block, limit, _dtype(node), input_scales(node))
        return ScaledExperts(graph, matrices, scales, scales_2, *how).products(b, flat, rows)
    hits = b.op("Equal", b.op("Unsqueeze", flat, b.const([1])), b.const(np.arange(count)))
    counts = b.op("ReduceSum", b.cast(hits, ir.DataType.INT64), b.const([0]), keepdims=0)
    gate, up, down = ([_flat(v) for v in matrices[part * count : (part + 1) * count]] for part in range(3))
    h = swiglu(b, *_gate_and_up(b, rows, counts, gate, up, graph), _dtype(node), limit)
    return b.cast(_products(b, h, counts, down), ir.DataType.FLOAT)


def _dtype(node: ir.Node) -> ir.DataType:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return dtype


def _width(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    assert shape is not None
    return int(shape[-1])  # type: ignore[arg-type]


def _flat(value: ir.Value) -> ir.Value:
    """A matrix [1, out, in], re-declared in place without its leading 1."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor) and len(tensor.shape) == 3:
        value.const_value = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=ir.Shape(tensor.shape.dims[1:]), name=tensor.name, base_dir=tensor.base_dir,
        )  # fmt: skip
        value.shape = value.const_value.shape
    return value


def _gate_and_up(
    b: Body, rows: ir.Value, counts: ir.Value, gate: list[ir.Value], up: list[ir.Value], graph: ir.Graph
) -> Sequence[ir.Value]:
    """Both products of every expert: by one Gemm where its two matrices lie side by side in the file."""
    pairs = [joined(g, u) for g, u in zip(gate, up, strict=True)]
    both = [pair for pair in pairs if pair is not None]
    if len(both) < len(pairs):
        return [_products(b, rows, counts, part) for part in (gate, up)]
    for pair in both:
        graph.register_initializer(pair)
    return b.ops("Split", _products(b, rows, counts, both), outputs=2, axis=-1, num_outputs=2)


def _products(b: Body, rows: ir.Value, counts: ir.Value, matrices: list[ir.Value]) -> ir.Value:
    """Sorted rows [M*K, in] times their experts' matrices: [M*K, out]."""
    shares = b.ops("Split", rows, counts, outputs=len(matrices), axis=0)
    return b.op(
        "Concat", *(b.op("Gemm", share, w, transB=1) for share, w in zip(shares, matrices, strict=True)), axis=0
    )
