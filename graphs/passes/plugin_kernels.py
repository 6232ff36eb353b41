"""Custom nodes as launches of their kernels, for TensorRT: what plugins take instead of bodies.

FP8 and packed E2M1 matrices are declared again as the words they lie in: kernels widen them themselves, and TensorRT
lets nothing but its own dequantising layers and plugins read constants of a quantised type, not even what stacks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from v4export.graphs.passes.declared_again import declared_again
from v4export.graphs.passes.replaced import replace
from v4export.plugins import BY_NODE
from v4export.plugins.function_body import VERSION
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Unfit
from v4export.plugins.kernels.nodes import NAMESPACE, NodeWriter
from v4export.plugins.moe_experts.onnx import OP_TYPE as EXPERTS
from v4export.plugins.moe_experts.onnx import operands_of

_WORD = ir.DataType.INT32
_PACKED = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)


def plugin_kernels(
    model: ir.Model, wanted: Callable[[str], bool] = lambda _: True, budget: int = PLAIN_SHARED
) -> dict[str, str]:
    """Replace every custom node that has kernels and is wanted, in place.

    Args:
        model: with custom nodes, types and ranks known.
        wanted: of a type of custom nodes, whether its kernels are.
        budget: shared memory of a launch, in bytes.

    Returns:
        types of nodes that keep their body though it was not wanted, and why.
    """
    kept: dict[str, str] = {}
    for node in list(model.graph):
        op = BY_NODE.get((node.domain, node.op_type))
        if op is None or op.kernels is None or not wanted(node.op_type):
            continue
        writer = NodeWriter(node.name or node.outputs[0].name or "", lambda value: _flat(value, model.graph), budget)
        try:
            results = op.kernels(writer, *arguments(node))
        except Unfit as e:
            kept[node.op_type] = str(e)
            continue
        replace(model.graph, node, [node], writer.body.nodes, node.outputs, results)
    used = {(node.domain, node.op_type) for node in model.graph}
    for key in [key for key in model.functions if key[0] == "v4" and key[:2] not in used]:
        model.functions.pop(key)
    common.RemoveUnusedNodesPass()(model)
    if any(node.domain == NAMESPACE for node in model.graph):
        model.opset_imports[NAMESPACE] = VERSION
    return kept


def arguments(node: ir.Node) -> list[Any]:
    """What the torch op would be called with: operands and attributes of a custom node, in the op's order."""
    op, inputs = BY_NODE[node.domain, node.op_type], list(node.inputs)
    found: list[Any] = []
    # Of the lists that an op may have, so many are there; what follows them is no part of one.
    filled = 3 * operands_of(node.attributes["format"].as_string()) if op.op_type == EXPERTS else 0
    for argument in op.torch_op._opoverload._schema.arguments:
        kind = str(argument.type)
        if kind == "List[Tensor]":
            taken = node.attributes["num_experts"].as_int() if filled > 0 else 0
            found.append([inputs.pop(0) for _ in range(taken)])
            filled -= 1
        elif "Tensor" in kind:
            found.append(inputs.pop(0) if inputs else None)
        else:
            found.append(node.attributes[argument.name].value)
    return found


def _flat(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """A stored matrix as one row of numbers, of packed or FP8 ones as one of int32."""
    tensor, packed = value.const_value, value.dtype in _PACKED
    if tensor is None or (packed and tensor.nbytes % _WORD.itemsize):
        raise Unfit(f"{value.name} is not a stored matrix of whole words")
    dtype = _WORD if packed else tensor.dtype
    return declared_again(value, graph, dtype, [1, int(tensor.nbytes // dtype.itemsize)])
