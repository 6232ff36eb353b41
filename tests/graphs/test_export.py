"""What an export leaves on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from traced import export_bundle

from v4export import api, presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.formats import quantize_blocks
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.errors import BadInput
from v4export.graphs.export import (
    LOWERED_FOR_CPU,
    PORTABLE,
    THINKING,
    THINKING_MIX,
    THINKING_STEP,
    for_cpu,
    graphs_in,
)
from v4export.graphs.lower import with_bodies
from v4export.graphs.shards import numpy_dtype
from v4export.package.bundle import Bundle

pytestmark = pytest.mark.slow

PRECISIONS = ("fp32", "bf16", "fp8")


def external(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """Location, offset and length of each weight that lies in a file."""
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = entry["location"], int(entry.get("offset", 0)), int(entry["length"])
    return found


def read(folder: Path, place: tuple[str, int, int]) -> bytes:
    location, offset, length = place
    with open(folder / location, "rb") as file:
        file.seek(offset)
        return file.read(length)


def load(folder: Path, name: str = PORTABLE) -> onnx.ModelProto:
    return onnx.load(folder / name, load_external_data=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_named_in_the_file_are_the_checkpoints(tiny_bundle, tiny_checkpoint, precision):
    bundle = tiny_bundle(precision)
    places = external(load(bundle.folder))
    for name, weight in audit(Checkpoint.open(tiny_checkpoint), scan_values=False).weights.items():
        dtype = bundle.precision.format_of(weight.name, weight.role).dtype
        if dtype == "float8_e4m3fn":
            wanted, scale = quantize_blocks(weight.decode())
            assert read(bundle.folder, places[name + "_scale_inv"]) == scale.tobytes(), name
        else:
            wanted = weight.decode().astype(numpy_dtype(dtype))
        assert read(bundle.folder, places[name]) == wanted.tobytes(), name


def test_nothing_is_written_where_nothing_changes(tiny_bundle):
    bundle = tiny_bundle("bf16")
    graphs = bundle.manifest["graphs"]
    assert graphs["written_bytes"] == 0 and graphs["linked"] == ["model.safetensors"]
    assert {location for location, *_ in external(load(bundle.folder)).values()} == {"weights/model.safetensors"}
    assert tiny_bundle("fp32").manifest["graphs"]["written_bytes"] > 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_graphs_read_the_same_bytes(tiny_bundle, precision):
    """The lowered copy may read two neighbours as one; it reads no byte that the portable graph does not."""
    folder = tiny_bundle(precision).folder
    portable, lowered = (
        {
            (location, unit)
            for location, start, size in external(load(folder, name)).values()
            for unit in range(start // 16, (start + size) // 16)
        }
        for name in (PORTABLE, LOWERED_FOR_CPU)
    )
    assert portable == lowered
    assert (folder / LOWERED_FOR_CPU).stat().st_size < 1 << 20


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lowered_graph_has_no_experts_node(tiny_bundle, precision):
    bundle = tiny_bundle(precision)
    portable, lowered = (load(bundle.folder, name) for name in (PORTABLE, LOWERED_FOR_CPU))
    assert sum(n.op_type == "MoeExperts" for n in portable.graph.node) == len(bundle.config.moe_layers)
    assert not any(n.op_type == "MoeExperts" for n in lowered.graph.node)
    assert not any(f.name == "MoeExperts" for f in lowered.functions)
    for one, two in zip(
        (*portable.graph.input, *portable.graph.output), (*lowered.graph.input, *lowered.graph.output), strict=True
    ):
        assert (one.name, one.type.tensor_type.elem_type) == (two.name, two.type.tensor_type.elem_type)


def test_lowered_numbers_are_the_portable_ones(tiny_bundle):
    bundle = tiny_bundle("fp32")
    rng = np.random.default_rng(0)
    c = bundle.config
    sessions = []
    for name in (PORTABLE, LOWERED_FOR_CPU):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        sessions.append(ort.InferenceSession(bundle.folder / name, options, providers=["CPUExecutionProvider"]))
    for B, S, T, position in ((1, 1, 0, [0]), (1, 33, 5, [5]), (3, 4, 12, [12, 0, 7])):
        feeds = {
            "input_ids": rng.integers(0, c.vocab_size, (B, S)),
            "position": np.array(position),
            "logits_at": np.tile(np.arange(S), (B, 1)),
        }
        for layer in range(c.num_layers):
            feeds[f"state.{layer}.latent"] = rng.normal(size=(B, T, c.latent_dim)).astype(np.float32)
        one, two = (session.run(None, feeds) for session in sessions)
        assert one[0].shape == (B, S, c.vocab_size)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("name", [PORTABLE, LOWERED_FOR_CPU])
def test_onnx_checker(tiny_checkpoint, tmp_path, name):
    """Of a bundle with copies of the shards, because the checker refuses hard links."""
    bundle = api.export(tiny_checkpoint, tmp_path / "out", precision="fp32", layers=range(2), copy_weights=True).bundle
    onnx.checker.check_model(bundle.folder / name)
    assert bundle.config.num_layers == 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_manifest(tiny_bundle, tiny_checkpoint, precision):
    bundle = tiny_bundle(precision)
    manifest = json.loads((bundle.folder / "v4export.json").read_text())
    listed = manifest["files"]
    on_disk = {p.relative_to(bundle.folder).as_posix() for p in bundle.folder.rglob("*") if p.is_file()}
    assert on_disk == {*listed, "v4export.json"} and {PORTABLE, LOWERED_FOR_CPU} <= set(listed)
    for name, entry in listed.items():
        data = (bundle.folder / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry.get("shared") or entry["sha256"] == hashlib.sha256(data).hexdigest()
    assert bundle.source == tiny_checkpoint.resolve() and bundle.max_seq_len == 1024
    assert manifest["checkpoint"]["header_sha256"] == Checkpoint.open(tiny_checkpoint).header_hash
    assert Bundle.open(bundle.folder).config == bundle.config == Checkpoint.open(tiny_checkpoint).config


def test_existing_folder_is_refused_before_any_work(tiny_bundle, tiny_checkpoint):
    folder = tiny_bundle("fp32").folder
    before = (folder / "v4export.json").read_bytes()
    with pytest.raises(BadInput, match="exists"):
        api.export(tiny_checkpoint, folder, precision="fp32")
    assert (folder / "v4export.json").read_bytes() == before


def test_no_provider_has_to_know_packed_numbers(tmp_path):
    """The copy for other providers reads the same bytes, by a table."""
    source = api.synth("tiny-v4-fp4", tmp_path / "hub")
    folder = export_bundle(source, tmp_path / "out", "mxfp4").folder
    packed = load(folder, PORTABLE)
    kinds = {t.data_type for t in packed.graph.initializer}
    assert onnx.TensorProto.FLOAT4E2M1 in kinds
    copy = ir.to_proto(with_bodies(folder / PORTABLE))
    assert onnx.TensorProto.FLOAT4E2M1 not in {t.data_type for t in copy.graph.initializer}
    assert not copy.functions and not any(n.domain for n in copy.graph.node)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """A bundle of a model that thinks, with copies of the shards."""
    folder = tmp_path_factory.mktemp("thinking")
    config = replace(presets.load("tiny-v3"), num_layers=1, moe_layers=(), reasoning=Reasoning(layers=2, steps=3))
    return export_bundle(synth(config, folder / "hub"), folder / "out", "bf16", copy_weights=True)


def test_files_of_a_model_that_thinks(thinking):
    graphs = [PORTABLE, THINKING, THINKING_STEP, THINKING_MIX]
    assert graphs_in(thinking.folder) == graphs == ["model.onnx", "think.onnx", "think_step.onnx", "think_mix.onnx"]
    files = [name for graph in graphs for name in (graph, for_cpu(graph))]
    manifest = thinking.manifest
    assert manifest["graphs"]["files"] == files and "think_step.cpu.onnx" in files
    assert {*files, "weights/model.safetensors", "tokenizer.json"} <= manifest["files"].keys()
    assert {p.name for p in thinking.folder.glob("*.onnx")} == {*files}
    assert manifest["thinking"] == {"steps": 3, "confidence": "entropy", "threshold": 1.0}
    nothing = {"layers": None, "engram_inside": False, "think_steps": None, "state": None, "draft": False}
    assert manifest["chosen"] == nothing
    for name in files:
        onnx.checker.check_model(thinking.folder / name)


def test_graphs_of_a_model_that_thinks_read_the_same_bytes(thinking):
    """A weight lies at one place for all of them, and each names it once."""
    places: dict[str, set] = {}
    for name in (file for graph in graphs_in(thinking.folder) for file in (graph, for_cpu(graph))):
        model = load(thinking.folder, name)
        assert len({t.name for t in model.graph.initializer}) == len(model.graph.initializer)
        for weight, place in external(model).items():
            places.setdefault(weight, set()).add(place)
        assert (thinking.folder / name).stat().st_size < 1 << 18
    assert all(len(some) == 1 for some in places.values())
    talk = {f"model.reasoning.talk_head.{i}.weight" for i in (0, 2, 4)}
    assert talk <= places.keys() and len({*external(load(thinking.folder, THINKING_MIX))} - talk) == 2 + 2
    assert places.keys() == audit(Checkpoint.open(thinking.source), scan_values=False).weights.keys()


def test_the_largest_design_points_at_all_of_its_weights(tmp_path):
    config = presets.load("v4-1t").first_layers(2)
    hub = synth(replace(config, left_out_layers=0), tmp_path / "hub", sparse=True)
    built = api.export(hub, tmp_path / "out", precision="bf16", think_steps=2, scan_values=False)
    assert built.graphs.written_bytes == 0 and built.graphs.pointed_bytes > 20e9 and built.graphs.beside_bytes > 200e9
    assert built.graphs.lint.experts_referenced == 3 * 288
    assert {THINKING, THINKING_STEP, THINKING_MIX} <= {*built.graphs.files}
