"""Nodes as this project's kernels for onnxruntime on a CPU take them (``plugins/cpu``).

Products with stored matrices become nodes of their own, ``v4::Linear``, which widen in registers what they read;
experts, attention and indexers keep the names of the portable graph. Nodes that no kernel takes are left, with their
bodies, to whoever lowers next.
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.graphs.passes.replaced import replace
from v4export.graphs.passes.stored_matrix import PACKED, STORED, StoredMatrix, readable, stored_matrix
from v4export.plugins.function_body import DOMAIN, Body
from v4export.plugins.moe_experts.onnx import OP_TYPE as EXPERTS
from v4export.plugins.moe_experts.onnx import input_scales

LINEAR, HEAD_LINEAR = "Linear", "HeadLinear"
#: What ``pointwise`` makes of chains of nodes.
NORM, ROUND, SUM, SWIGLU = "RmsNorm", "Round", "Sum", "SwiGlu"
#: And ``rotate_rows`` of those around rotary embedding.
ROTATE = "Rotate"
#: Operators whose portable nodes kernels take as they are.
SAME = frozenset(
    (
        "CandidateSelect", "CompressTokens", "CompressedAttention", "HashRoute", "HyperCoefficients", "HyperConnection",
        "HyperMix", "IndexReselect", "IndexSelect", "LatentAttention", "MoeRoute", "SparseAttention",
        "SparseLatentAttention", "WindowAttention",
    )
)  # fmt: skip
KERNELS = SAME | {EXPERTS, LINEAR, HEAD_LINEAR, NORM, ROTATE, ROUND, SUM, SWIGLU}

#: What a kernel rounds its result to, by the type that the portable node's has.
_ROUNDINGS = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16"}


def cpu_kernels(model: ir.Model) -> bool:
    """Rewrite in place every node that a kernel takes, and drop the bodies of those; whether there was any."""
    graph, found = model.graph, False
    for node in list(graph.all_nodes()):
        if node.op_type == "Gemm" and (weight := _weight(node)):
            _linear(graph, node, weight)
        elif node.op_type == EXPERTS and takes_experts(node):
            _experts(graph, node)
        elif node.op_type in SAME:
            node.attributes["activations"] = ir.AttrString("activations", rounding(node.outputs[0]))
        else:
            continue
        found = True
    for key in [key for key in model.functions if key[0] == DOMAIN and key[1] in KERNELS - {EXPERTS}]:
        model.functions.pop(key)
    return found


def takes_experts(node: ir.Node) -> bool:
    """Whether a kernel has the format of these experts, and need not round what they multiply."""
    first = node.inputs[3]
    return first is not None and first.dtype in STORED and not input_scales(node)


def _weight(gemm: ir.Node) -> StoredMatrix | None:
    """What a Gemm multiplies by, if that is a stored matrix that a kernel can read."""
    a = gemm.attributes
    by_rows = a.get_int("transB", 0) == 1 and not a.get_int("transA", 0)
    plain = by_rows and a.get_float("alpha", 1.0) == a.get_float("beta", 1.0) == 1
    return stored_matrix(gemm.inputs[1]) if plain else None


def _linear(graph: ir.Graph, gemm: ir.Node, weight: StoredMatrix) -> None:
    body = Body(f"{gemm.name or gemm.outputs[0].name}.")
    bias = [v for v in gemm.inputs[2:] if v is not None]
    y = body.op(
        LINEAR, gemm.inputs[0], *weight.read_by(graph), *bias, domain=DOMAIN,
        **weight.attributes, bias=len(bias),
        activations=rounding(gemm.outputs[0]),
    )  # fmt: skip
    replace(gemm.graph, gemm, [gemm], body.nodes, gemm.outputs, [y])


def _experts(graph: ir.Graph, node: ir.Node) -> None:
    down = node.inputs[3 + 2 * node.attributes["num_experts"].as_int()]
    assert down is not None and down.shape is not None
    width, inner = (int(d) for d in down.shape[-2:])  # type: ignore[arg-type]
    for name, value in {"width": width, "out": inner}.items():
        node.attributes[name] = ir.AttrInt64(name, value)
    node.attributes["activations"] = ir.AttrString("activations", rounding(node.outputs[0]))
    for index, operand in enumerate(node.inputs):
        if operand is not None and operand.dtype == PACKED:
            node.replace_input_with(index, readable(graph, operand))


def rounding(value: ir.Value) -> str:
    """What a kernel is to round its result to, where the portable node makes this value: a type's name, or nothing."""
    return "" if value.dtype is None else _ROUNDINGS.get(value.dtype, "")
