"""Packed E2M1 matrices widened with a table, for onnxruntime on a CPU, which has no kernel that takes their type.

An initialiser of type FLOAT4E2M1 is declared again as the bytes it lies in, two numbers each, and what ``Cast`` would
have made of it, the first thing that the body of ``TRT_BlockDequantize`` does, is looked up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from v4export.graphs.passes.byte_tables import TABLES, shared
from v4export.graphs.passes.declared_again import declared_again
from v4export.graphs.passes.replaced import replace
from v4export.plugins.function_body import Body

#: The two numbers of each byte, float32 [256, 2]: the even column's in the low bits.
PAIRS = np.stack(TABLES[ir.DataType.FLOAT4E2M1], axis=1)


def unpack_fp4(model: ir.Model) -> bool:
    """Replace in place every Cast and Shape of a FLOAT4E2M1 initialiser; functions must have been inlined.

    Returns:
        Whether there was any.
    """
    graph = model.graph
    nodes = [n for n in graph if n.op_type in _READERS and n.inputs and _is_packed(n.inputs[0])]
    for node in nodes:
        body = Body(f"{node.name or node.outputs[0].name}.")
        y = _READERS[node.op_type](body, node, graph)
        replace(graph, node, [node], body.nodes, node.outputs, [y])
    for name in [name for name, value in graph.initializers.items() if _is_packed(value) and not value.uses()]:
        graph.initializers.pop(name)
    return bool(nodes)


def _is_packed(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT4E2M1


def _cast(b: Body, node: ir.Node, graph: ir.Graph) -> ir.Value:
    packed = node.inputs[0]
    assert packed is not None
    *outer, columns = _sizes(packed)
    codes = b.cast(declared_again(packed, graph, ir.DataType.UINT8, [*outer, columns // 2]), ir.DataType.INT32)
    numbers = b.op("Gather", shared(graph, "table.e2m1_pairs", PAIRS), codes, axis=0)
    return b.cast(b.reshape(numbers, *_sizes(packed)), ir.DataType(node.attributes["to"].as_int()))


def _shape(b: Body, node: ir.Node, graph: ir.Graph) -> ir.Value:
    assert node.inputs[0] is not None and not {"start", "end"} & node.attributes.keys()
    return b.const(_sizes(node.inputs[0]))


_READERS: dict[str, Callable[[Body, ir.Node, ir.Graph], ir.Value]] = {"Cast": _cast, "Shape": _shape}


def _sizes(packed: ir.Value) -> list[int]:
    assert packed.const_value is not None
    return [int(d) for d in packed.const_value.shape]  # type: ignore[arg-type]
