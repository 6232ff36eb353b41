from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import psutil
import pytest
from traced import traced_once

from v4export import presets
from v4export.config import Reasoning
from v4export.graphs.trace import ROWS, THINK, THINK_MIX, THINK_STEP
from v4export.model.load import hub_name
from v4export.precision import precision
from v4export.state_contract import state_tensors

pytestmark = pytest.mark.slow

V3_PARTS = {"embed", "dense", "routed", "head"}
HYPER = {"HyperConnection": 2, "HyperMix": 2, "MoeExperts": 1}
#: Custom nodes of each part of the tiny presets.
CUSTOM = {
    "tiny-v3": {
        "embed": {},
        "dense": {"LatentAttention": 1},
        "routed": {"LatentAttention": 1, "MoeRoute": 1, "MoeExperts": 1},
        "head": {},
    },
    "tiny-v3.2": {
        "embed": {},
        "dense": {"IndexSelect": 1, "SparseLatentAttention": 1},
        "routed": {"IndexSelect": 1, "SparseLatentAttention": 1, "MoeRoute": 1, "MoeExperts": 1},
        "head": {},
    },
    "tiny-v4": {
        "embed": {},
        "window hash": {**HYPER, "WindowAttention": 1, "HashRoute": 1},
        "csa hash": {**HYPER, "CompressTokens": 2, "IndexSelect": 1, "SparseAttention": 1, "HashRoute": 1},
        "hca": {**HYPER, "CompressTokens": 1, "CompressedAttention": 1, "MoeRoute": 1},
        "csa": {**HYPER, "CompressTokens": 2, "IndexSelect": 1, "SparseAttention": 1, "MoeRoute": 1},
        "head": {},
    },
}

#: Reasoning layers behind one dense layer, and thoughts of three steps.
THINKS = {"num_layers": 1, "moe_layers": (), "reasoning": Reasoning(layers=2, steps=3)}


def operators(part):
    return Counter(node.op_type for node in part.graph)


def test_parts_do_not_depend_on_the_number_of_experts(trace):
    _, _, few = trace(num_experts=8, num_groups=4)
    _, _, many = trace(num_experts=256, num_groups=4)
    assert few.keys() == many.keys() == V3_PARTS
    for kind in V3_PARTS:
        assert operators(few[kind]) == operators(many[kind])
        assert few[kind].weights == many[kind].weights


@pytest.mark.parametrize("preset", CUSTOM)
def test_one_node_for_each_custom_op(trace, preset):
    _, _, parts = trace(preset)
    custom = {kind: Counter(n.op_type for n in part.graph if n.domain) for kind, part in parts.items()}
    assert custom == CUSTOM[preset]


@pytest.mark.parametrize("preset", CUSTOM)
def test_inputs_are_activations_and_then_weights(trace, preset):
    _, _, parts = trace(preset)
    for kind, part in parts.items():
        assert [v.name for v in part.graph.inputs] == [*part.reads, *(f"weight:{n}" for n in part.weights)], kind
        assert len(part.graph.outputs) == len(part.outputs)


@pytest.mark.parametrize("preset", CUSTOM)
def test_what_varies_is_what_the_contract_says(trace, preset):
    """Nothing else became a constant while tracing, and nothing constant varies."""
    config, _, parts = trace(preset)
    for kind, layer in config.kinds.items():
        part = parts[kind]
        inputs = dict(zip(part.reads, part.graph.inputs, strict=False))
        outputs = dict(zip(part.outputs, part.graph.outputs, strict=True))
        assert [isinstance(d, int) for d in inputs["hidden"].shape] == [False] + [True] * len(config.hidden_shape)
        for tensor in state_tensors(config, layer):
            held, new = inputs[f"state.{tensor.name}"].shape, outputs[tensor.name].shape
            assert [isinstance(d, int) for d in held] == [False, tensor.ring is not None, True]
            assert [isinstance(d, int) for d in new] == [False, False, True]
            assert held[2] == new[2] == tensor.width and (tensor.ring is None or held[1] == tensor.ring)


def test_a_routed_block_is_traced_with_one_expert(trace):
    _, _, parts = trace()
    assert [n for n in parts["routed"].weights if ".experts." in n] == [
        f"mlp.experts.0.{part}_proj.weight" for part in ("gate", "up", "down")
    ]


def test_a_kind_that_does_not_occur_is_not_traced(trace):
    config = presets.load("tiny-v3")
    _, _, all_dense = trace(moe_layers=())
    assert all_dense.keys() == V3_PARTS - {"routed"}
    assert config.moe_layers


def test_a_model_of_671_billion_parameters_takes_no_memory(trace):
    trace()  # whatever is loaded once for all
    process = psutil.Process()
    before = process.memory_info().rss
    config, precision, parts = trace("deepseek-v3", "fp8")
    assert process.memory_info().rss - before < 500 << 20
    assert parts.keys() == V3_PARTS
    routed = dict(zip(parts["routed"].weights, parts["routed"].graph.inputs[5:], strict=True))
    gate = routed["mlp.experts.0.gate_proj.weight"]
    assert tuple(gate.shape) == (config.moe_intermediate_size, config.hidden_size) == (2048, 7168)
    assert gate.dtype.name == "FLOAT8E4M3FN" and precision.linear.scaled
    for part in parts.values():
        assert sum(v.const_value.nbytes for v in part.graph.initializers.values()) < 1 << 16


def test_fp4_experts_enter_as_bytes_with_their_multipliers(trace):
    _, _, parts = trace("tiny-v4-fp4", "mxfp4")
    inputs = dict(zip(parts["csa"].weights, parts["csa"].graph.inputs[len(parts["csa"].reads) :], strict=True))
    up, scale = (inputs[f"mlp.experts.0.up_proj.{name}"] for name in ("weight", "weight_scale_inv"))
    assert (up.dtype.name, *up.shape) == ("UINT8", 64, 48) and (scale.dtype.name, *scale.shape) == ("BFLOAT16", 64, 3)


def test_fp8_matrices_enter_with_their_multipliers(trace):
    _, precision, parts = trace("tiny-v3", "fp8")
    weights = parts["routed"].weights
    scales = {n for n in weights if n.endswith("_scale_inv")}
    assert {n.removesuffix("_scale_inv") for n in scales} == {n for n in weights if n.endswith("_proj.weight")} | {
        "self_attn.kv_a_proj_with_mqa.weight"
    }
    assert precision.format_of("gate", "router").dtype == "bfloat16"
    assert operators(parts["routed"])["TRT_BlockDequantize"] > 0


def test_parameters_have_hub_names():
    """The tracer's weight names are the checkpoint's, so nothing has to be translated."""
    import torch

    from v4export.checkpoint import names
    from v4export.model.block import Block

    for preset in CUSTOM:
        config = presets.load(preset)
        for layer in config.kinds.values():
            with torch.device("meta"):
                block = Block(config, layer)
            wanted = {n for n in names.expected(config) if n.startswith(f"model.layers.{layer}.")}
            assert {hub_name(name, config, layer) for name, _ in block.named_parameters()} - {None} == wanted


@pytest.fixture(scope="module")
def thinking(trace):
    return trace("tiny-v3", "bf16", **THINKS)


def test_parts_of_a_model_that_thinks(thinking):
    _, _, parts = thinking
    own = {ROWS: {}, THINK: {"ThoughtAttention": 3 * 2}, THINK_STEP: {"ThoughtAttention": 2}, THINK_MIX: {}}
    assert parts.keys() == V3_PARTS - {"routed"} | own.keys()
    assert {kind: Counter(n.op_type for n in parts[kind].graph if n.domain) for kind in own} == own
    assert parts[ROWS].outputs == ("latent.0", "latent.1") and parts["head"].outputs == ("logits", "trunk")
    after = [f"thought.{k}.{j}" for k in (1, 2, 3) for j in (0, 1)]
    assert parts[THINK].outputs == ("logits", "weight", "tokens", *after)
    assert parts[THINK_STEP].outputs == ("thought", "token", "own.0", "own.1", "thought.0", "thought.1")
    assert parts[THINK_MIX].outputs == ("logits", "weight")


def test_a_thought_grows_with_its_steps_and_its_weights_do_not(thinking):
    _, _, parts = thinking
    think, step, mix = (parts[kind] for kind in (THINK, THINK_STEP, THINK_MIX))
    # Seven matrices a layer, lm_head for a token, and the talk head and lm_head for the end.
    assert [operators(part)["Gemm"] for part in (think, step, mix)] == [3 * 2 * 7 + 1 + 4, 2 * 7 + 1, 4]
    assert len({*think.weights}) == len(think.weights) and {*think.weights} == {*step.weights, *mix.weights}
    inputs = dict(zip(think.weights, think.graph.inputs[len(think.reads) :], strict=True))
    layers = [name for name in think.weights if ".layers." in name]
    assert len(layers) == 2 * 12
    # The matrix that attention absorbs is taken apart once for all steps.
    assert {len(inputs[name].uses()) for name in layers if "kv_b_proj" not in name} == {3}
    assert {len(inputs[name].uses()) for name in layers if "kv_b_proj" in name} == {1}


def test_what_varies_of_a_thought_is_what_its_reads_say(thinking):
    config, _, parts = thinking
    hidden, vocab, width = config.hidden_size, config.vocab_size, config.thinker.latent_dim
    fixed = {"logits": [2, vocab], "weight": [2], "tokens": [2, 1], "token": [2], "thought": [2, hidden]}
    fixed |= {f"{name}.{j}": [count, width] for name, count in (("latent", 2), ("own", 3)) for j in (0, 1)}
    for kind in (ROWS, THINK, THINK_STEP, THINK_MIX):
        part = parts[kind]
        assert [v.name for v in part.graph.inputs] == [*part.reads, *(f"weight:{n}" for n in part.weights)], kind
        for value, activation in zip(part.graph.inputs, part.reads.values(), strict=False):
            assert constants(value) == constants(activation.dims), (kind, value.name)
        for name, value in zip(part.outputs, part.graph.outputs, strict=True):
            varying, *rest = fixed.get(name, [1, hidden])  # hidden states after a layer
            assert constants(value) == [None] * varying + rest, (kind, name)


def constants(value):
    """The dimensions that do not vary, None in place of the others."""
    return [d if isinstance(d, int) else None for d in getattr(value, "shape", value)]


def test_parameters_of_a_head_that_thinks_have_hub_names():
    import torch

    from v4export.checkpoint import names
    from v4export.model.reasoning import ThinkingHead

    for preset in CUSTOM:
        own = Reasoning(1, 3, kv_lora_rank=20, qk_nope_head_dim=10, v_head_dim=14, intermediate_size=56)
        config = replace(presets.load(preset), reasoning=own)
        with torch.device("meta"):
            head = ThinkingHead(config)
        outside = ("model.embed_tokens.weight", "model.norm.weight", "model.hc_head.", "lm_head.weight")
        wanted = {n for n in names.expected(config) if n.startswith(("model.reasoning.", *outside))}
        assert {hub_name(name, config) for name, _ in head.named_parameters()} == wanted


@pytest.mark.slow
def test_a_trace_that_was_kept_is_the_trace(tmp_path):
    """What tests share between processes: the same graphs, and the same way to fill them."""
    config = presets.load("tiny-v3")
    arguments = config, precision("fp8", config)
    traced, read = (traced_once(tmp_path)(*arguments) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    for name, part in traced.items():
        one, two = (ir.serde.serialize_graph(p.graph).SerializeToString() for p in (part, read[name]))
        assert one == two and part.graph.opset_imports == read[name].graph.opset_imports
        assert (part.reads, part.weights, part.outputs) == (read[name].reads, read[name].weights, read[name].outputs)
