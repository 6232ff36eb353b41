"""Whole models as graphs of launches, beside the same graph's portable bodies."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from emulated_graph import EmulatedGraph
from small_models import small

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.graphs.passes.plugin_kernels import arguments, plugin_kernels
from v4export.plugins import BY_NODE, OPS
from v4export.plugins.kernels.emulate import compiler
from v4export.plugins.kernels.nodes import CODE, LAUNCH, NAMESPACE

PRESETS = ("tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    """From a preset and a precision, the folder of its graph, with weights of its own."""

    @functools.cache
    def make(preset: str, precision: str) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        checkpoint = synth(small(preset), folder / "hub")
        options = {"precision": precision, "max_seq_len": 256, "copy_weights": True}
        return api.export(checkpoint, folder / "out", **options).bundle.folder

    return make


def feeds_of(session: ort.InferenceSession, B: int, S: int, position: list[int]) -> dict[str, np.ndarray]:
    """A step behind a past of random rows."""
    rng, feeds = np.random.default_rng(0), {}
    named = {
        "input_ids": rng.integers(0, 200, (B, S)),
        "position": np.array(position),
        "decoder_start": np.zeros(B, np.int64),
    }
    named["logits_at"] = np.tile(np.arange(S), (B, 1))
    for value in session.get_inputs():
        rows = {"B": B, "S": S}
        shape = [d if isinstance(d, int) else rows.get(d, max(position) + 1) for d in value.shape]
        feeds[value.name] = named.get(value.name, rng.standard_normal(shape).astype(np.float32))
    return feeds


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("preset", PRESETS)
def test_launches_compute_what_bodies_do(preset: str, exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output of a whole model, prompts of unequal lengths and then one token."""
    folder = exported(preset, "fp32")
    graph = EmulatedGraph(folder / "model.onnx", monkeypatch)
    assert graph.kept == {} and graph.launches > 10
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for B, S, position in ((2, 5, [11, 3]), (1, 1, [40])):
        feeds = feeds_of(session, B, S, position)
        wanted, got = session.run(None, feeds), graph.run(feeds)
        for value, one in zip(session.get_outputs(), wanted, strict=True):
            np.testing.assert_allclose(got[value.name], one, rtol=2e-5, atol=2e-5, err_msg=value.name)


def kernel_graph(folder: Path, **options) -> tuple[ir.Model, dict[str, str]]:
    model = ir.load(folder / "model.onnx")
    return model, plugin_kernels(model, **options)


@pytest.mark.slow
def test_every_launch_is_a_node_with_its_code(exported) -> None:
    model, kept = kernel_graph(exported("tiny-v3", "fp8"))
    launches, config = [node for node in model.graph if node.domain == NAMESPACE], presets.load("tiny-v3")
    assert kept == {} and len(launches) == 2 * config.num_layers + 5 * len(config.moe_layers)
    for node in launches:
        attributes = node.attributes
        assert attributes[LAUNCH].as_string().startswith(f"entry {attributes[LAUNCH].as_string().split()[1]}\nthreads")
        assert f".visible .entry {attributes[LAUNCH].as_string().split()[1]}(" in attributes[CODE].as_string()
        assert attributes["plugin_namespace"].as_string() == NAMESPACE and attributes["aot"].as_int() == 1
    assert {key[1] for key in model.functions} == {"TRT_BlockDequantize"}


@pytest.mark.slow
def test_packed_experts_are_the_words_of_the_file(exported) -> None:
    """Not a byte is written, and no FP8 initialiser is left but those that TensorRT widens itself."""
    folder = exported("tiny-v3", "fp8")
    model, _ = kernel_graph(folder)
    words = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT32]
    assert words and all(isinstance(v.const_value, ir.ExternalTensor) for v in words)
    assert all("experts" in v.name for v in words)
    assert not any(
        v.dtype == ir.DataType.FLOAT8E4M3FN and "mlp.experts" in v.name for v in model.graph.initializers.values()
    )


@pytest.mark.slow
def test_ops_that_are_not_wanted_keep_their_bodies(exported) -> None:
    model, kept = kernel_graph(exported("tiny-v3", "fp8"), wanted=lambda op: op == "MoeRoute")
    kinds = {(node.domain, node.op_type) for node in model.graph if node.domain.startswith("v4")}
    assert kinds == {(NAMESPACE, "MoeRoute"), ("v4", "MoeExperts"), ("v4", "LatentAttention")} and kept == {}
    assert ("v4", "MoeRoute") not in {key[:2] for key in model.functions}
    assert {"MoeExperts", "LatentAttention"} <= {key[1] for key in model.functions}


@pytest.mark.slow
def test_a_kernel_that_does_not_fit_leaves_the_body(exported) -> None:
    model, kept = kernel_graph(exported("tiny-v3", "fp32"), budget=1 << 10)
    assert "bytes of shared memory" in kept["LatentAttention"]
    assert "LatentAttention" in {node.op_type for node in model.graph}


@pytest.mark.parametrize("op", [op for op in OPS if op.kernels], ids=lambda op: op.op_type)
def test_an_op_is_called_with_its_node(op) -> None:
    """Operands and attributes of nodes stand in the order of the torch op's arguments, under their names."""
    schema = op.torch_op._opoverload._schema.arguments
    others = [a.name for a in schema if "Tensor" not in str(a.type)]
    assert set(others) <= set(op.attributes)
    lists = sum(str(a.type) == "List[Tensor]" for a in schema)
    tensors = [ir.Value(name=f"x{i}") for i in range(sum("Tensor" in str(a.type) for a in schema) - lists + 2 * lists)]
    values = {name: {"INT": 2, "FLOAT": 0.5, "STRING": "s"}[kind] for name, kind in op.attributes.items()}
    values |= {"format": "nvfp4"} if "format" in values else {}  # that of most operands
    node = ir.Node(op.domain, op.op_type, tensors, ir.convenience.convert_attributes(values))
    found = arguments(node)
    assert [v for v in found if not isinstance(v, ir.Value | list)] == [values[name] for name in others]
    flat = [v for arg in found for v in (arg if isinstance(arg, list) else [arg]) if isinstance(v, ir.Value)]
    assert flat == tensors
    assert BY_NODE[op.domain, op.op_type] is op
