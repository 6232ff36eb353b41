"""Nodes as this project's kernels for onnxruntime on a CPU take them (``plugins/cpu``).

Products with stored matrices become nodes of their own, ``v4::Linear``, which widen in registers what they read;
experts, attention and indexers keep the names of the portable graph. Nodes that no kernel takes are left, with their
bodies, to whoever lowers next.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from v4export.graphs.passes.declared_again import declared_again
from v4export.graphs.passes.replaced import replace
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE
from v4export.plugins.function_body import DOMAIN, Body
from v4export.plugins.moe_experts.onnx import OP_TYPE as EXPERTS
from v4export.plugins.moe_experts.onnx import input_scales

LINEAR = "Linear"
#: Operators whose portable nodes kernels take as they are.
SAME = frozenset(
    (
        "CandidateSelect", "CompressedAttention", "IndexReselect", "IndexSelect", "LatentAttention", "SparseAttention",
        "SparseLatentAttention", "WindowAttention",
    )
)  # fmt: skip
KERNELS = SAME | {EXPERTS, LINEAR}

_PACKED = ir.DataType.FLOAT4E2M1
_STORED = (
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN, _PACKED,
)  # fmt: skip
#: What a kernel rounds its result to, by the type that the portable node's has.
_ROUNDINGS = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16"}


def cpu_kernels(model: ir.Model) -> bool:
    """Rewrite in place every node that a kernel takes, and drop the bodies of those; whether there was any."""
    graph, found = model.graph, False
    for node in list(graph):
        if node.op_type == "Gemm" and (weight := _weight(node)):
            _linear(graph, node, weight)
        elif node.op_type == EXPERTS and takes_experts(node):
            _experts(graph, node)
        elif node.op_type in SAME:
            node.attributes["activations"] = ir.AttrString("activations", _rounding(node))
        else:
            continue
        found = True
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] in KERNELS - {EXPERTS}]:
        model.functions.pop(key)
    return found


def takes_experts(node: ir.Node) -> bool:
    """Whether a kernel has the format of these experts, and need not round what they multiply."""
    first = node.inputs[3]
    return first is not None and first.dtype in _STORED and not input_scales(node)


@dataclass(frozen=True)
class _Weight:
    """A stored matrix [N, K].

    Attributes:
        operands: the initialiser, its multipliers, and theirs.
        block: rows and columns that share a multiplier.
    """

    operands: tuple[ir.Value, ...]
    block: tuple[int, int] = (0, 0)


def _weight(gemm: ir.Node) -> _Weight | None:
    """What a Gemm multiplies by, if that is a stored matrix that a kernel can read."""
    a, value = gemm.attributes, gemm.inputs[1]
    plain = (
        a["transB"].as_int() == 1 and not a["transA"].as_int() and a["alpha"].as_float() == a["beta"].as_float() == 1
    )
    if value is None or not plain:
        return None
    if value.is_initializer():
        return _Weight((value,)) if value.dtype in _STORED else None
    found = _dequantized(value)
    if found is None:
        return None
    matrix, scale, block = found
    outer = _dequantized(scale)
    operands = (matrix, scale) if outer is None else (matrix, *outer[:2])
    return _Weight(operands, block) if matrix.dtype in _STORED and matrix.is_initializer() else None


def _dequantized(value: ir.Value) -> tuple[ir.Value, ir.Value, tuple[int, int]] | None:
    node = value.producer()
    if node is None or node.op_type != BLOCK_DEQUANTIZE:
        return None
    matrix, scale = node.inputs
    rows, columns = node.attributes["block_shape"].as_ints()
    assert matrix is not None and scale is not None
    return matrix, scale, (rows, columns)


def _linear(graph: ir.Graph, gemm: ir.Node, weight: _Weight) -> None:
    matrix, *scales = weight.operands
    assert matrix.shape is not None
    out, width = (int(d) for d in matrix.shape)  # type: ignore[arg-type]
    body = Body(f"{gemm.name or gemm.outputs[0].name}.")
    bias = [v for v in gemm.inputs[2:] if v is not None]
    y = body.op(
        LINEAR, gemm.inputs[0], _readable(graph, matrix), *scales, *bias, domain=DOMAIN,
        out=out, width=width, rows=weight.block[0], columns=weight.block[1], bias=len(bias),
        activations=_rounding(gemm),
    )  # fmt: skip
    replace(graph, gemm, [gemm], body.nodes, gemm.outputs, [y])


def _experts(graph: ir.Graph, node: ir.Node) -> None:
    down = node.inputs[3 + 2 * node.attributes["num_experts"].as_int()]
    assert down is not None and down.shape is not None
    width, inner = (int(d) for d in down.shape[-2:])  # type: ignore[arg-type]
    for name, value in {"width": width, "inner": inner}.items():
        node.attributes[name] = ir.AttrInt64(name, value)
    node.attributes["activations"] = ir.AttrString("activations", _rounding(node))
    for index, operand in enumerate(node.inputs):
        if operand is not None and operand.dtype == _PACKED:
            node.replace_input_with(index, _readable(graph, operand))


def _readable(graph: ir.Graph, matrix: ir.Value) -> ir.Value:
    """A matrix as onnxruntime holds it: it has no packed types."""
    if matrix.dtype != _PACKED:
        return matrix
    assert matrix.shape is not None
    *outer, columns = (int(d) for d in matrix.shape)  # type: ignore[arg-type]
    return declared_again(matrix, graph, ir.DataType.UINT8, [*outer, columns // 2])


def _rounding(node: ir.Node) -> str:
    dtype = node.outputs[0].dtype
    return "" if dtype is None else _ROUNDINGS.get(dtype, "")
