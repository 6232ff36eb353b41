"""Engines of whole models with every kind of layer, built without a GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from small_models import small

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.engine.options import EngineOptions
from v4export.engine.preflight import preflight
from v4export.engine.profiles import derive_profiles, input_dims
from v4export.graphs.export import PORTABLE, REMEMBERING, THINKING, THINKING_MIX, THINKING_STEP
from v4export.graphs.stamp import state_name
from v4export.package.bundle import Bundle
from v4export.state_contract import may_skip_decoder, state_tensors

pytestmark = pytest.mark.slow

LENGTH, CHUNK = 300, 8
#: The formats of weights that each precision stores, as the engine's proofs name them.
STORED = {"fp32": {"fp32"}, "fp16": {"fp16"}, "bf16": {"bf16"}, "fp8": {"fp8"}, "mxfp4": {"fp4", "fp8"}}
#: An FP8 engine of DeepSeek-V4 is built by ``tests/oracles/test_v4_end_to_end.py``.
CASES = [
    ("tiny-v3.2", "bf16", "sm80"),
    ("tiny-v3.2", "fp8", "sm89"),
    ("tiny-v4-fp4", "bf16", "sm80"),
    ("tiny-v4-fp4", "mxfp4", "sm120"),
    ("tiny-v4.1", "fp16", "sm86"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(lambda preset: synth(small(preset), tmp_path_factory.mktemp("hub") / preset))


@pytest.mark.parametrize(("preset", "precision", "target"), CASES)
def test_engine(checkpoint, tmp_path, preset, precision, target):
    pytest.importorskip("tensorrt_rtx")
    config = small(preset)
    out = tmp_path / "out"
    api.export(checkpoint(preset), out, precision=precision, max_seq_len=LENGTH)
    assert preflight(out / PORTABLE) == []

    inputs = input_dims(out / PORTABLE)
    for layer in range(config.num_layers):
        for tensor in state_tensors(config, layer):
            assert inputs[state_name(layer, tensor.name)] == ("B", tensor.held_dim, tensor.width)
    decode, prefill = derive_profiles(inputs, max_batch=2, max_seq_len=LENGTH, max_chunk=CHUNK)
    assert decode.shapes.keys() == prefill.shapes.keys() == inputs.keys()

    options = EngineOptions(targets=[target], backend="tensorrt_rtx", max_batch=2, max_chunk=CHUNK)
    reports = api.engine(out, options)
    report = reports[PORTABLE]
    assert report.targets == (target,) and (out / report.path).stat().st_size == report.bytes
    proofs = dict(report.proofs)
    assert {claim.rpartition(" ")[2] for claim in proofs if "stored as" in claim} == STORED[precision]
    experts = 3 * config.num_experts * len(config.moe_layers)
    if precision in ("fp8", "mxfp4"):
        assert report.layers["DEQUANTIZE"] > experts
    if precision == "mxfp4":
        assert proofs["the network reads fp4 weights"].startswith(f"{experts} layers that widen")
    if may_skip_decoder(config):
        assert preflight(out / REMEMBERING) == []
        smaller = reports[REMEMBERING]
        assert (out / smaller.path).stat().st_size == smaller.bytes < report.bytes


#: Two reasoning layers behind a dense one, and thoughts of three steps.
THINKS = replace(presets.load("tiny-v3"), num_layers=1, moe_layers=(), reasoning=Reasoning(layers=2, steps=3))


def bytes_of(graph: Path, part: str = "") -> int:
    """Bytes of a graph's weights whose names have a part."""
    weights = onnx.load(graph, load_external_data=False).graph.initializer
    itemsizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.BFLOAT16: 2}
    return sum(math.prod(w.dims) * itemsizes[w.data_type] for w in weights if w.external_data and part in w.name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_of_thoughts(tmp_path, precision):
    pytest.importorskip("tensorrt_rtx")
    out, names = tmp_path / "out", [PORTABLE, THINKING, THINKING_STEP, THINKING_MIX]
    api.export(synth(THINKS, tmp_path / "hub"), out, precision=precision, max_seq_len=LENGTH)
    for name in names:
        assert preflight(out / name) == [], name
    steps = derive_profiles(
        input_dims(out / THINKING_STEP), max_batch=2, max_seq_len=LENGTH, max_chunk=CHUNK, max_steps=3
    )
    width = THINKS.latent_dim
    assert [p.shapes["own.1"] for p in steps] == [
        ((0, 1, 1, width), (1, 2, 1, width), (2, 2, 1, width)),
        ((0, 1, 1, width), (1, 1, 1, width), (2, 2, CHUNK, width)),
    ]

    options = EngineOptions(targets=["sm80"], backend="tensorrt_rtx", max_batch=2, max_chunk=CHUNK)
    reports = api.engine(out, options)
    assert [*reports] == [*Bundle.open(out).manifest["engines"]] == names
    for name, report in reports.items():
        assert (out / report.path).stat().st_size == report.bytes and report.path == Path(name).with_suffix(".engine")
        proofs = dict(report.proofs)
        assert {claim.rpartition(" ")[2] for claim in proofs if "stored as" in claim} == STORED[precision]
        # Another copy of a layer's weights would take half of all layers'.
        stored, layers = bytes_of(out / name), bytes_of(out / name, ".reasoning.layers.")
        assert stored <= report.weights_mib * 2**20 < 1.02 * stored, name
        assert name not in (THINKING, THINKING_STEP) or 1.02 * stored < stored + layers / 2


def test_engines_of_thoughts_whose_steps_would_share_fp8(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    api.export(synth(replace(THINKS, reasoning=Reasoning(1, 2)), tmp_path / "hub"), out, precision="fp8")
    reports = api.engine(out, EngineOptions(targets=["sm89"], backend="tensorrt_rtx", max_chunk=CHUNK))
    found = {name: report.precision for name, report in reports.items()}
    assert found == {PORTABLE: "fp8", THINKING_STEP: "fp8", THINKING_MIX: "bf16"}
