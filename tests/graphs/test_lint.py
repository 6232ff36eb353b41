"""Each rule, broken on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from v4export import presets
from v4export.errors import NotSupported
from v4export.graphs import lint as rules
from v4export.graphs.lint import lint
from v4export.precision import PRECISIONS

pytestmark = pytest.mark.slow


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == name)


def append(model: ir.Model, name: str, op_type: str = "Identity", domain: str = "") -> None:
    model.graph.append(ir.Node(domain, op_type, [model.graph.outputs[0]], name=name))


def wrong_opset(model):
    model.graph.opset_imports[""] = 22


def no_body(model):
    del model.functions["v4", "MoeRoute", ""]


def no_body_inside_a_body(model):
    body = model.functions["v4", "LatentAttention", ""]
    body.append(ir.Node("v4", "Other", [body.inputs[0]], name="inner"))


def foreign_op(model):
    append(model, "head.foreign", "Gelu", "com.example")
    value = ir.val("x")
    graph = ir.Graph([value], [value], nodes=[], opset_imports={"": 23}, name="Gelu")
    model.functions["com.example", "Gelu", ""] = ir.Function("com.example", "Gelu", graph=graph, attributes=[])


def idle_weight(model):
    tensor = ir.tensor(np.zeros(3, np.float32), name="idle")
    model.graph.register_initializer(
        ir.Value(name="idle", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    )


def idle_input(model):
    model.graph.inputs.append(ir.Value(name="idle", shape=ir.Shape(["B"]), type=ir.TensorType(ir.DataType.INT64)))


def uneven_layers(model):
    append(model, "layers.2.extra")


def a_node_more_in_every_routed_layer(model):
    append(model, "layers.1.extra")
    append(model, "layers.2.extra")


def second_experts_node(model):
    # Swapped for another node of the layer, so that the count stays right.
    operands = len(node(model, "MoeExperts").inputs)
    for layer in (1, 2):
        other = next(n for n in model.graph if n.name.startswith(f"layers.{layer}.") and n.op_type == "MoeRoute")
        other.op_type = "MoeExperts"
        other.resize_inputs(operands)


def experts_out_of_order(model):
    experts = node(model, "MoeExperts")
    one, two = experts.inputs[4], experts.inputs[5]
    experts.replace_input_with(4, two)
    experts.replace_input_with(5, one)


def expert_twice(model):
    experts = node(model, "MoeExperts")
    # The one that is left out is still read elsewhere, so that only the order is wrong.
    append(model, "head.reader")
    model.graph[-1].replace_input_with(0, experts.inputs[4])
    experts.replace_input_with(4, experts.inputs[3])


BROKEN = {
    wrong_opset: "opset 22",
    no_body: "v4::MoeRoute has no function",
    no_body_inside_a_body: "v4::Other has no function",
    foreign_op: "com.example::Gelu is not one of the project's ops",
    idle_weight: "weight idle is in the graph and nothing reads it",
    idle_input: "input idle is in the graph and nothing reads it",
    uneven_layers: r"layer 2 has \d+ nodes",
    a_node_more_in_every_routed_layer: r"layer 1 has \d+ nodes",
    second_experts_node: r"layer 1 \(routed\) has 2 MoeExperts nodes",
    experts_out_of_order: "layer 1: its expert matrices are not all there, in order",
    expert_twice: "layer 1: its expert matrices are not all there, in order",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_rule(stamped, damage):
    config, model, parts = stamped()
    damage(model)
    with pytest.raises(NotSupported, match=BROKEN[damage]):
        lint(model, config, PRECISIONS["fp32"], parts)


def test_tensor_too_large(stamped, monkeypatch):
    config, model, parts = stamped()
    sizes = {name: v.const_value.size for name, v in model.graph.initializers.items()}
    largest = max(sizes, key=sizes.__getitem__)
    monkeypatch.setattr(rules, "MAX_ELEMENTS", sizes[largest])
    lint(model, config, PRECISIONS["fp32"], parts)
    monkeypatch.setattr(rules, "MAX_ELEMENTS", sizes[largest] - 1)
    with pytest.raises(NotSupported, match="elements, more than"):
        lint(model, config, PRECISIONS["fp32"], parts)


def test_multipliers_out_of_order(stamped):
    config, model, parts = stamped("tiny-v3", "fp8")
    experts = node(model, "MoeExperts")
    first = 3 + 3 * config.num_experts
    one, two = experts.inputs[first], experts.inputs[first + 1]
    experts.replace_input_with(first, two)
    experts.replace_input_with(first + 1, one)
    with pytest.raises(NotSupported, match="layer 1: its expert matrices are not all there, in order"):
        lint(model, config, PRECISIONS["fp32"], parts)


def test_selecting_more_than_topk_takes(stamped):
    config, model, parts = stamped()
    node(model, "MoeRoute").attributes["top_k"] = ir.AttrInt64("top_k", 3841)
    with pytest.raises(NotSupported, match=r"MoeRoute selects more.*\n.*k = 3841, at most 3840"):
        lint(model, config, PRECISIONS["fp32"], parts)


def test_an_indexer_that_selects_too_many(stamped):
    config = presets.load("tiny-v3.2")
    for top_k in (3840, 3841):
        config, model, parts = stamped("tiny-v3.2", indexer=replace(config.indexer, top_k=top_k))
        if top_k == 3840:
            lint(model, config, PRECISIONS["fp32"], parts)
            continue
        with pytest.raises(NotSupported, match=r"IndexSelect selects more.*\n.*k = 3841, at most 3840"):
            lint(model, config, PRECISIONS["fp32"], parts)


@pytest.mark.parametrize("where", ["graph", "body"])
def test_scatter_with_a_sum(stamped, where):
    config, model, parts = stamped()
    for reduction in ("none", "add"):
        attribute = ir.AttrString("reduction", reduction)
        inside = model.graph if where == "graph" else model.functions["v4", "LatentAttention", ""]
        value = inside.outputs[0]
        inside.append(ir.Node("", "ScatterElements", [value] * 3, [attribute], name="head.scatter"))
        if reduction == "none":
            lint(model, config, PRECISIONS["fp32"], parts)
    with pytest.raises(NotSupported, match=r"head\.scatter: ScatterElements with reduction add"):
        lint(model, config, PRECISIONS["fp32"], parts)


MOE = {"v4::MoeRoute", "v4::MoeExperts"}
V4 = {"v4::HyperMix", "v4::HyperConnection", "v4::WindowAttention", "v4::CompressedAttention", "v4::SparseAttention"}
OPS = {
    "tiny-v3": MOE | {"v4::LatentAttention"},
    "tiny-v3.2": MOE | {"v4::SparseLatentAttention", "v4::IndexSelect"},
    "tiny-v4": MOE | V4 | {"v4::HashRoute", "v4::IndexSelect", "v4::CompressTokens"},
}


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("preset", OPS)
def test_what_was_proved(stamped, preset, precision):
    config, model, parts = stamped(preset, precision)
    found = lint(model, config, PRECISIONS[precision], parts)
    assert found.experts_referenced == 3 * config.num_experts * len(config.moe_layers)
    assert found.nodes_per_layer.keys() == config.kinds.keys() and min(found.nodes_per_layer.values()) > 5
    assert set(found.bodies) == OPS[preset] | ({"trt::TRT_BlockDequantize"} if precision == "fp8" else set())
