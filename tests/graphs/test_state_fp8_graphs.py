"""Graphs whose cached rows are E4M3: only what TensorRT takes makes and reads numbers of that type."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from small_models import small

from v4export import presets
from v4export.config import Reasoning
from v4export.graphs.lint import lint_nodes
from v4export.graphs.passes.expand_prefill import expand_prefill
from v4export.graphs.passes.plugin_kernels import plugin_kernels
from v4export.graphs.stamp import new_state_name, state_name
from v4export.plugins import BY_NODE
from v4export.state_contract import E4M3, state_tensors

FP8 = ir.DataType.FLOAT8E4M3FN
THINKS = Reasoning(1, 3, kv_lora_rank=24, qk_nope_head_dim=16, v_head_dim=16, intermediate_size=80)
CASES = [
    pytest.param("tiny-v3", {}, id="v3"),
    *(
        pytest.param(
            preset, changes, id=f"{preset} {'thinks' if 'reasoning' in changes else ''}", marks=pytest.mark.slow
        )
        for preset, changes in (
            ("tiny-v3.2", {}),
            ("tiny-v4", {"num_layers": 3}),
            ("tiny-v4.1", {}),
            ("tiny-v3", {"reasoning": THINKS}),
        )
    ),
]


def narrow(all_stamped, preset: str, changes: dict, precision: str = "bf16"):
    config = replace(small(preset), state_fp8=True, **changes)
    fields = {
        name: getattr(config, name)
        for name in config.__dataclass_fields__
        if getattr(config, name) != getattr(presets.load(preset), name)
    }
    return all_stamped(preset, precision, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "changes"), CASES)
def test_rows_and_multipliers_go_in_and_out(all_stamped, preset, changes):
    config, models, _ = narrow(all_stamped, preset, changes)
    types = {v.name: v.dtype for v in (*models["model.onnx"].graph.inputs, *models["model.onnx"].graph.outputs)}
    read = {v.name: v for model in models.values() for v in model.graph.inputs}
    for layer in range(config.state_layers):
        for tensor in state_tensors(config, layer):
            name, new = state_name(layer, tensor.name), new_state_name(layer, tensor.name)
            wanted = {E4M3: FP8, "float32": ir.DataType.FLOAT, None: ir.DataType.BFLOAT16}[tensor.dtype]
            assert read[name].dtype == types[new] == wanted
            assert [*read[name].shape] == ["B", tensor.held_dim, tensor.width]
    for model in models.values():
        lint_nodes(model)


@pytest.mark.parametrize(("preset", "changes"), CASES)
def test_nothing_but_quantising_nodes_has_to_do_with_the_type(all_stamped, preset, changes):
    config, models, _ = narrow(all_stamped, preset, changes)
    kept = sum(t.dtype == E4M3 for i in range(config.state_layers) for t in state_tensors(config, i))
    for name, model in models.items():
        makers = [node for node in model.graph if any(v.dtype == FP8 for v in node.outputs)]
        readers = [node for node in model.graph if any(v is not None and v.dtype == FP8 for v in node.inputs)]
        assert {node.op_type for node in makers} <= {"QuantizeLinear"}
        assert {node.op_type for node in readers} <= {"DequantizeLinear", "Shape"}  # which reads no number
        assert len(makers) == kept or name != "model.onnx"


@pytest.mark.slow
def test_attention_has_a_second_form_for_prompts_and_kernels_all_the_same(all_stamped):
    """Both are made around attention nodes, whose cached rows no longer are inputs of the graph."""
    config, models, _ = narrow(all_stamped, "tiny-v3", {}, "fp32")
    assert expand_prefill(models["model.onnx"])
    assert sum(node.op_type == "If" for node in models["model.onnx"].graph) == config.num_layers
    config, models, _ = narrow(all_stamped, "tiny-v3", {})
    model = models["model.onnx"]
    assert not plugin_kernels(model)
    assert not [n for n in model.graph if (n.domain, n.op_type) in BY_NODE]
