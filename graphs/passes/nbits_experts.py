"""Experts of integer matrices as onnxruntime's ``QMoE``, which reads four or eight bits a number of those chosen.

The model's own router decides: its weights, spread over a row of all experts, are given both as what experts are
chosen by and as what they are mixed by. A chosen expert has a positive weight and the others have none.

It computes in float32 from its input to its result, where the portable body rounds to bfloat16 on the way. Experts of
any other activations are left to ``scaled_experts``.
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.graphs.passes.nbits_linear import DOMAIN
from v4export.graphs.passes.replaced import replace
from v4export.graphs.repacked import BITS, COLUMNS, Repacking, layer_of, stacks
from v4export.plugins.function_body import Body
from v4export.plugins.moe_experts.onnx import OP_TYPE as MOE_EXPERTS

OP_TYPE = "QMoE"

#: Its operands between the multipliers of down projections and the weights that experts are mixed by.
_ABSENT = 7


def nbits_experts(model: ir.Model, repacking: Repacking) -> bool:
    """Replace in place every MoeExperts node that there is a kernel for; whether there was any."""
    nodes = [node for node in model.graph if node.op_type == MOE_EXPERTS and _has_kernel(node)]
    for node in nodes:
        body = Body(f"{node.name}.")
        y = _mixed(body, node, model.graph, repacking)
        replace(model.graph, node, [node], body.nodes, node.outputs, [y])
    if nodes:
        model.graph.opset_imports[DOMAIN] = 1
    return bool(nodes)


def _has_kernel(node: ir.Node) -> bool:
    stored, first, dtype = node.attributes["format"].as_string(), node.inputs[3], node.outputs[0].dtype
    assert first is not None and first.name is not None
    in_file = isinstance(first.const_value, ir.ExternalTensor) and layer_of(first.name) is not None
    return stored in BITS and dtype == ir.DataType.BFLOAT16 and in_file


def _mixed(b: Body, node: ir.Node, graph: ir.Graph, repacking: Repacking) -> ir.Value:
    x, weights, indices, *operands = (v for v in node.inputs if v is not None)
    a = node.attributes
    count, limit, bits = a["num_experts"].as_int(), a["limit"].as_float(), BITS[a["format"].as_string()]
    parts = [[str(v.name) for v in operands[part * count : (part + 1) * count]] for part in range(3)]
    layer = layer_of(parts[0][0])
    assert layer is not None and operands[0].shape is not None and indices.shape is not None
    inner, width = (int(d) for d in operands[0].shape[-2:])  # type: ignore[arg-type]
    stacked = (repacking.value(graph, one) for one in stacks(layer, parts, bits, inner, width))
    both, both_scales, down, down_scales = stacked
    everyone = b.op("ConstantOfShape", b.op("Concat", b.dim(x, 0), b.const([count]), axis=0))
    # Added up, should a table name an expert twice for a token.
    share = b.op("ScatterElements", everyone, indices, weights, axis=1, reduction="add")
    absent = [None] * _ABSENT
    cut = {"swiglu_limit": limit} if limit else {}
    return b.op(
        OP_TYPE, x, share, both, both_scales, None, down, down_scales, *absent, share, domain=DOMAIN,
        k=int(indices.shape[-1]),  # type: ignore[arg-type]
        expert_weight_bits=bits, block_size=COLUMNS, accuracy_level=0,
        activation_type="swiglu", activation_alpha=1.0, activation_beta=0.0, swiglu_fusion=1,
        normalize_routing_weights=0, **cut,
    )  # fmt: skip
