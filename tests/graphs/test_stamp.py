from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest

from v4export import presets
from v4export.checkpoint import names
from v4export.config import Reasoning
from v4export.graphs.export import PORTABLE, THINKING, THINKING_MIX, THINKING_STEP
from v4export.graphs.lint import lint, lint_nodes
from v4export.graphs.stamp import experts_name, hidden_name, new_state_name, selected_name, state_name
from v4export.precision import PRECISIONS
from v4export.state_contract import state_tensors

pytestmark = pytest.mark.slow


def layer_nodes(model: ir.Model, layer: int) -> Counter:
    return Counter(n.op_type for n in model.graph if n.name.startswith(f"layers.{layer}."))


def test_a_layer_of_256_experts_has_the_nodes_of_one_of_8(stamped):
    eight, few, _ = stamped(num_experts=8, num_groups=4)
    wide, many, parts = stamped(num_experts=256, num_groups=4)
    assert len(few.graph) == len(many.graph)
    for layer in range(eight.num_layers):
        assert layer_nodes(few, layer) == layer_nodes(many, layer)
    assert sum(layer_nodes(many, 1).values()) < 120
    assert lint(many, wide, PRECISIONS["fp32"], parts).experts_referenced == 3 * 256 * len(wide.moe_layers)
    one, two = (Counter(n.op_type for n in m.functions["v4", "MoeExperts", ""].all_nodes()) for m in (few, many))
    assert one == two
    for node in (n for n in many.graph if n.op_type == "MoeExperts"):
        assert node.attributes["num_experts"].as_int() == 256 and len(node.inputs) == 3 + 3 * 256


def test_layers_are_stamped_from_one_trace(stamped):
    """Sixty layers from the trace of three."""
    config, model, parts = stamped(wider={"num_layers": 60, "moe_layers": tuple(range(3, 60))})
    found = lint(model, config, PRECISIONS["fp32"], parts)
    assert found.nodes_per_layer.keys() == {"dense", "routed"}
    assert len(model.graph) == 3 * found.nodes_per_layer["dense"] + 57 * found.nodes_per_layer["routed"] + sum(
        1 for n in model.graph if not n.name.startswith("layers.")
    )
    assert len(model.functions) == 3


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_inputs_and_outputs(stamped, precision):
    config, model, _ = stamped("tiny-v3", precision)
    layers = range(config.num_layers)
    states, rows = ([name(i, "latent") for i in layers] for name in (state_name, new_state_name))
    assert [v.name for v in model.graph.inputs] == ["input_ids", "position", "logits_at", *states]
    assert [v.name for v in model.graph.outputs] == ["logits", *rows]
    shapes = {v.name: [str(d) for d in v.shape] for v in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["input_ids"] == ["B", "S"] and shapes["position"] == ["B"] and shapes["logits_at"] == ["B", "Q"]
    assert shapes["state.1.latent"] == ["B", "T", str(config.latent_dim)]
    assert shapes["new_state.1.latent"] == ["B", "S", str(config.latent_dim)]
    assert shapes["logits"] == ["B", "Q", str(config.vocab_size)]
    state = ir.DataType.FLOAT if precision == "fp32" else ir.DataType.BFLOAT16
    assert {v.dtype for v in model.graph.inputs[3:]} == {v.dtype for v in model.graph.outputs[1:]} == {state}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    produced = {v.name for n in model.graph for v in n.outputs}
    assert {hidden_name(i) for i in (-1, *layers)} | {experts_name(i) for i in config.moe_layers} <= produced


@pytest.mark.parametrize("preset", ["tiny-v4", "tiny-v3.2"])
def test_state_is_that_of_the_contract(stamped, preset):
    config, model, _ = stamped(preset, "bf16")
    values = {v.name: v for v in (*model.graph.inputs, *model.graph.outputs)}
    count = 4
    for layer in range(config.num_layers):
        for tensor in state_tensors(config, layer):
            held, new = values[state_name(layer, tensor.name)], values[new_state_name(layer, tensor.name)]
            assert [str(d) for d in held.shape] == ["B", str(tensor.held_dim), str(tensor.width)]
            assert [str(d) for d in new.shape] == ["B", tensor.returned_dim, str(tensor.width)]
            assert held.dtype == new.dtype == (ir.DataType.FLOAT if tensor.dtype else ir.DataType.BFLOAT16)
            count += 2
    assert len(values) == count
    produced = {v.name for n in model.graph for v in n.outputs}
    assert {selected_name(i) for i in range(config.num_layers) if state_name(i, "index_key") in values} <= produced


def test_every_kind_of_layer_is_stamped_from_its_own_trace(stamped):
    config, model, parts = stamped("tiny-v4")
    found = lint(model, config, PRECISIONS["fp32"], parts)
    assert found.nodes_per_layer.keys() == {"window hash", "csa hash", "hca", "csa"}
    for layer in range(config.num_layers):
        assert sum(layer_nodes(model, layer).values()) == len(parts[config.kind(layer)].graph)


def test_fp4_experts_are_references_to_the_packed_bytes(stamped):
    config, model, _ = stamped("tiny-v4-fp4", "mxfp4")
    value = model.graph.initializers["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert value.dtype == ir.DataType.FLOAT4E2M1
    assert tuple(value.shape) == (1, config.moe_intermediate_size, config.hidden_size)
    assert value.const_value.length == config.moe_intermediate_size * config.hidden_size // 2
    assert model.graph.initializers["model.layers.0.mlp.gate.tid2eid"].dtype == ir.DataType.INT64


@pytest.mark.parametrize(
    ("preset", "precision"), [("tiny-v3", "fp32"), ("tiny-v3", "fp8"), ("tiny-v4", "fp32"), ("tiny-v4-fp4", "mxfp4")]
)
def test_weights_are_references(stamped, preset, precision):
    config, model, _ = stamped(preset, precision)
    external = {n: v for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    embedded = [v for n, v in model.graph.initializers.items() if n not in external]
    assert {n for n in external if not n.endswith("_scale_inv")} == set(names.expected(config))
    assert any(n.endswith("_scale_inv") for n in external) == (precision in ("fp8", "mxfp4"))
    assert sum(v.const_value.nbytes for v in embedded) < 1 << 12
    assert all(v.const_value.shape[0] == 1 for n, v in external.items() if ".mlp.experts." in n)


def test_names(stamped):
    _, model, _ = stamped()
    node_names = [n.name for n in model.graph]
    assert len(set(node_names)) == len(node_names)
    custom = Counter((n.domain, n.op_type) for n in model.graph if n.domain)
    assert custom == {("v4", "LatentAttention"): 3, ("v4", "MoeRoute"): 2, ("v4", "MoeExperts"): 2}


def test_same_graph_twice(stamped):
    one, two = (ir.to_proto(stamped()[1]).SerializeToString(deterministic=True) for _ in range(2))
    assert one == two


def test_tied_head_reads_the_embedding(stamped):
    _, model, _ = stamped(wider={"tie_word_embeddings": True})
    assert "lm_head.weight" not in model.graph.initializers
    readers = {use.node.name.split(".")[0] for use in model.graph.initializers["model.embed_tokens.weight"].uses()}
    assert readers == {"embed", "head"}


def test_router_without_a_bias_shares_zeros(stamped):
    config, model, _ = stamped(wider={"topk_method": "greedy"})
    assert replace(presets.load("tiny-v3"), topk_method="greedy") == config
    zeros = model.graph.initializers["no_correction_bias"]
    assert len(list(zeros.uses())) == len(config.moe_layers)
    assert not zeros.const_value.numpy().any()


@pytest.fixture(scope="module")
def thinking(all_stamped):
    """Of a dense layer with two reasoning layers behind it, whose thoughts have three steps."""
    return all_stamped("tiny-v3", "bf16", num_layers=1, moe_layers=(), reasoning=Reasoning(layers=2, steps=3))


def ends(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Dimensions and type of every input and then of every output."""
    values = (*model.graph.inputs, *model.graph.outputs)
    return {v.name: (*map(str, v.shape), v.dtype.name) for v in values}


def test_graphs_of_thoughts(thinking):
    config, graphs, _ = thinking
    assert [*graphs] == [PORTABLE, THINKING, THINKING_STEP, THINKING_MIX]
    hidden, vocab, width = (str(n) for n in (config.hidden_size, config.vocab_size, config.thinker.latent_dim))
    trunk, number, said = ("B", "Q", hidden, "BFLOAT16"), ("B", "Q", "INT64"), ("B", "Q", vocab, "FLOAT")
    held = {f"state.{i}.latent": ("B", "T", width, "BFLOAT16") for i in (1, 2)}
    ends_of_all = {
        THINKING: {"trunk": trunk, "thought_at": number, **held}
        | {"logits": said, "weight": ("B", "Q", "FLOAT"), "tokens": ("B", "Q", "1", "INT64")},
        THINKING_STEP: {"thought": trunk, "entering": number, "thought_at": number, **held}
        | {f"own.{j}": ("P", "B", "Q", width, "BFLOAT16") for j in (0, 1)}
        | {"new_thought": trunk, "token": number}
        | {f"new_own.{j}": ("P+1", "B", "Q", width, "BFLOAT16") for j in (0, 1)},
        THINKING_MIX: {"trunk": trunk, "thought": trunk, "logits": said, "weight": ("B", "Q", "FLOAT")},
    }
    for name, wanted in ends_of_all.items():
        assert list(ends(graphs[name]).items()) == list(wanted.items()), name
    whole = ends(graphs[PORTABLE])
    assert whole["trunk"] == trunk and "state.0.latent" in whole and "state.1.latent" not in whole
    assert [v.name for v in graphs[PORTABLE].graph.outputs] == [
        "logits", "trunk", "new_state.0.latent", "new_state.1.latent", "new_state.2.latent",
    ]  # fmt: skip
    assert whole["new_state.2.latent"] == ("B", "S", width, "BFLOAT16")


def test_graphs_of_thoughts_keep_the_rules(thinking):
    config, graphs, parts = thinking
    assert lint(graphs[PORTABLE], config, PRECISIONS["bf16"], parts).nodes_per_layer.keys() == {"dense"}
    for graph in graphs.values():
        lint_nodes(graph)
        node_names = [n.name for n in graph.graph]
        assert len({*node_names}) == len(node_names)
    bodies = {name: [f.name for f in graph.functions.values()] for name, graph in graphs.items()}
    own = ["ThoughtAttention"]
    assert bodies == {PORTABLE: ["LatentAttention"], THINKING: own, THINKING_STEP: own, THINKING_MIX: []}


def test_graphs_of_thoughts_share_their_weights(thinking):
    """Each has a weight once, however often it is read, and all of them have it where it lies."""
    config, graphs, _ = thinking
    places: dict[str, set[tuple]] = {}
    for graph in graphs.values():
        weights = [v.const_value for v in graph.graph.initializers.values()]
        external = [w for w in weights if isinstance(w, ir.ExternalTensor)]
        assert sum(w.nbytes for w in weights if w not in external) < 1 << 12
        for w in external:
            places.setdefault(w.name, set()).add((w.location, w.offset, w.length, w.dtype, tuple(w.shape)))
        own = {(w.location, w.offset) for w in external}
        assert len(own) == len(external)
    assert all(len(some) == 1 for some in places.values()) and places.keys() == names.expected(config).keys()


def test_hidden_states_of_thoughts_have_names(thinking):
    _, graphs, _ = thinking
    made = {name: {v.name for n in graph.graph for v in n.outputs} for name, graph in graphs.items()}
    assert {f"thought.{k}.{j}" for k in (1, 2, 3) for j in (0, 1)} <= made[THINKING]
    assert {"thought.0", "thought.1"} <= made[THINKING_STEP]
