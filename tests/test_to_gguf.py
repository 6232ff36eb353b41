"""The benchmark's GGUF files: llama.cpp predicts what the exported graph does, in float32; other types come close."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from traced import export_bundle

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.errors import NotSupported
from v4export.runtime.onnx import OnnxExecutor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

pytestmark = pytest.mark.slow
gguf = pytest.importorskip("gguf", reason="the extra `bench` is not installed")

import to_gguf  # noqa: E402

V3 = replace(
    presets.load("tiny-v3"), yarn=None, dtype="float32", hidden_size=128, q_lora_rank=64, kv_lora_rank=64,
    qk_nope_head_dim=32, v_head_dim=32, intermediate_size=224, moe_intermediate_size=64,
)  # fmt: skip
TINY_V4 = presets.load("tiny-v4")
# llama.cpp rotates index keys 64 numbers at a time.
V4 = replace(
    TINY_V4, yarn=None, dtype="float32", hidden_size=128, q_lora_rank=64, moe_intermediate_size=64,
    num_mtp_layers=0, compressed=replace(TINY_V4.compressed, head_dim=64),
    indexer=replace(TINY_V4.indexer, head_dim=64),
)  # fmt: skip
MODELS = {"V3": V3, "V4": V4}
IDS = np.random.default_rng(0).integers(3, 300, 200)
#: Largest difference of logits over their standard deviation, and how alike predictions of narrower weights are.
SAME, ALIKE = 1e-4, {"bf16": 0.95, "q8_0": 0.95, "q4_0": 0.85}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {name: synth(config, tmp_path_factory.mktemp(name) / "hub") for name, config in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_number_is_in_the_file(checkpoints, tmp_path, name):
    """Stacked, split and transposed, but none lost and none twice."""
    from v4export.checkpoint.audit import audit
    from v4export.checkpoint.index import Checkpoint

    file = to_gguf.convert(checkpoints[name], tmp_path / "model.gguf", "f32")
    found = gguf.GGUFReader(file)
    stored = audit(Checkpoint.open(checkpoints[name]), scan_values=False).weights
    ours = np.sort(np.concatenate([np.asarray(one.data, np.float64).reshape(-1) for one in found.tensors]))
    theirs = np.sort(np.concatenate([one.data.numpy().astype(np.float64).reshape(-1) for one in stored.values()]))
    np.testing.assert_array_equal(ours, theirs)
    assert found.fields["general.architecture"].contents() == {"V3": "deepseek2", "V4": "deepseek4"}[name]


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="the extra `bench` is not installed")
@pytest.mark.parametrize("name", MODELS)
def test_predictions(checkpoints, tmp_path, name):
    from llama import Llama

    bundle = export_bundle(checkpoints[name], tmp_path / "out", "fp32")
    onnx = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=512, threads=1)
    state = onnx.new_state()
    wanted = [onnx.step(IDS[None, :150], state, logits_at_BQ=np.array([[149]]))[0, 0]]
    wanted += [onnx.step(IDS[None, at : at + 1], state, logits_at_BQ=np.zeros((1, 1), int))[0, 0] for at in (150, 151)]
    for kind in to_gguf.TYPES:
        model = Llama(to_gguf.convert(checkpoints[name], tmp_path / f"{kind}.gguf", kind), max_seq_len=512, exact=True)
        model.hold(0)
        found = [np.array(model.read(ids)) for ids in (IDS[:150], IDS[150:151], IDS[151:152])]
        for ours, theirs in zip(wanted, found, strict=True):
            apart, alike = np.abs(ours - theirs).max() / ours.std(), np.corrcoef(ours, theirs)[0, 1]
            assert apart < SAME if kind == "f32" else alike > ALIKE[kind], (kind, apart, alike)


def test_what_it_does_not_know(tmp_path):
    for preset in ("tiny-v3", "tiny-v3.2", "tiny-v4.1"):
        with pytest.raises(NotSupported, match="the converter knows"):
            to_gguf.convert(synth(presets.load(preset), tmp_path / preset), tmp_path / "out.gguf", "f32")
