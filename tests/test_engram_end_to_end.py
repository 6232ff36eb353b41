"""A checkpoint with Engram through the whole pipeline: what comes out, and what goes wrong with a clear word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from traced import export_bundle

from v4export import api
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import read_header
from v4export.errors import BadInput, NotSupported
from v4export.precision import precision
from v4export.runtime.onnx import OnnxExecutor

Capture = pytest.CaptureFixture[str]
PROMPT = "def read(self, path): return open(path).read()"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.synth("tiny-v4.1", tmp_path_factory.mktemp("engram") / "hub")


@pytest.fixture(scope="module")
def exported(hub: Path) -> Path:
    return export_bundle(hub, hub.with_name("out"), "fp8").folder


@pytest.fixture
def copy(hub: Path, tmp_path: Path) -> Callable[[], Path]:
    """A checkpoint that may be damaged."""
    return lambda: Path(shutil.copytree(hub, tmp_path / "hub"))


@pytest.mark.slow
def test_what_a_bundle_has(exported: Path) -> None:
    manifest = json.loads((exported / "v4export.json").read_text())
    assert {"model.onnx", "model.cpu.onnx", "remember.onnx", "remember.cpu.onnx", "engram.json", "engram.map"} <= {
        *manifest["files"]
    }
    stored = json.loads((exported / "engram.json").read_text())["layers"]["1"]
    # FP8 rows and their multipliers are the checkpoint's own bytes.
    assert (stored["table"]["dtype"], stored["scale"]["dtype"]) == ("F8_E4M3", "F8_E8M0")
    assert stored["table"]["file"].startswith("weights/model")
    layers = json.loads((exported / "engram.json").read_text())["layers"].values()
    beside = sum(layer[part]["nbytes"] for layer in layers for part in ("table", "scale"))
    assert manifest["graphs"]["beside_bytes"] == beside
    assert precision("fp8", Checkpoint.open(Path(manifest["checkpoint"]["path"])).config).linear.block == (32, 32)


@pytest.mark.slow
def test_run(exported: Path) -> None:
    whole, again = (api.run(exported, prompt=PROMPT, max_new_tokens=24, ignore_eos=True) for _ in range(2))
    assert whole.tokens == again.tokens and len(whole.tokens) == 24
    skipped = api.run(exported, prompt=PROMPT, max_new_tokens=24, ignore_eos=True, skip_decoder=True)
    assert len(skipped.tokens) == 24
    # A prompt no longer than the window has nothing to skip.
    short = [api.run(exported, prompt=PROMPT[:12], max_new_tokens=9, skip_decoder=skip) for skip in (False, True)]
    assert short[0].tokens == short[1].tokens


@pytest.mark.slow
def test_the_next_chunk_is_looked_up_while_one_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = api.Bundle.open(exported)
    executor = OnnxExecutor(exported, bundle.config, bundle.precision, max_seq_len=256)
    feed, begun, state = executor._lookup, [], executor.new_state()
    assert feed is not None
    prefetch = feed.prefetch
    monkeypatch.setattr(feed, "prefetch", lambda *a: (begun.append(a[0].copy()), prefetch(*a)))
    computed = []
    compute = feed._compute
    monkeypatch.setattr(feed, "_compute", lambda *a: (computed.append(a[0].shape), compute(*a))[1])
    ids = np.arange(40, 70)[None]
    executor.step(ids[:, :20], state, logits_at_BQ=np.zeros((1, 0), np.int64), coming=(ids[:, 20:], None))
    logits = executor.step(ids[:, 20:], state, logits_at_BQ=np.array([[9]]))
    assert len(begun) == 1 and begun[0].tolist() == ids[:, 20:].tolist()
    assert computed == [(1, 20), (1, 10)], "what was begun must be what is taken"
    other = executor.new_state()
    np.testing.assert_array_equal(logits, executor.step(ids, other, logits_at_BQ=np.array([[29]])))


@pytest.mark.slow
def test_a_corrupt_table_is_found_when_it_is_read(exported: Path, tmp_path: Path, capfd: Capture) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "out"))
    table = json.loads((bundle / "engram.json").read_text())["layers"]["1"]["scale"]
    with open(bundle / table["file"], "r+b") as stream:
        stream.seek(table["offset"])
        stream.write(b"\xff" * table["nbytes"])
    outcome = call(capfd, "run", str(bundle), "--prompt", PROMPT, "-n", "4")
    assert outcome.code == 2 and "the Engram table is corrupt" in outcome.err, outcome.err


def test_another_tokenizer(copy: Callable[[], Path], capfd: Capture) -> None:
    folder = copy()
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    # One token that differs from another in its case alone becomes one that differs in more.
    names = content["model"]["vocab"]
    names["AB"] = names.pop("A")
    file.write_text(json.dumps(content))
    outcome = call(capfd, "export", str(folder), "-o", str(folder.with_name("o")), "-q")
    assert outcome.code == 2 and "the tokenizer does not match the Engram tables" in outcome.err, outcome.err
    assert not folder.with_name("o").exists()


def test_no_tokenizer(copy: Callable[[], Path]) -> None:
    folder = copy()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        api.export(folder, folder.with_name("o"))


def test_a_wrong_number_of_rows(copy: Callable[[], Path], capfd: Capture) -> None:
    folder = copy()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["engram_num_embeddings"][1] += 1
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call(capfd, "inspect", str(folder))
    assert outcome.code == 2 and "not the number of rows of the Engram tables" in outcome.err
    del config["text_config"]["engram_num_embeddings"]
    config["text_config"]["engram_vocab_size"] += 90
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call(capfd, "inspect", str(folder))
    assert outcome.code == 2 and "of the wrong shape" in outcome.err and "engram.embed" in outcome.err


def test_what_a_release_has_beside_its_text_model(copy: Callable[[], Path]) -> None:
    folder = copy()
    names = ["vision.blocks.0.attn.qkv.weight", "aligner.0.weight", "image_newline", "layers.0.ffn.gate.bias_vl",
             "mtp.0.main_proj.weight", "mtp.2.markov_head.embed.weight"]  # fmt: skip
    (file,) = folder.glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, end = json.loads(raw[8 : 8 + length]), len(raw) - 8 - length
    header |= {
        n: {"dtype": "BF16", "shape": [1], "data_offsets": [end + 2 * i, end + 2 * i + 2]} for i, n in enumerate(names)
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + b"\0\0" * len(names))
    read_header(file)
    summary = api.inspect(folder).audit
    assert "6 skipped" in summary and "3 vision tower; text alone is exported" in summary
    assert "1 router bias of image tokens" in summary and "2 prediction stage (MTP or DSpark)" in summary


def test_tables_of_a_model_that_has_none(tmp_path: Path, capfd: Capture) -> None:
    hub = api.synth("tiny-v3.1", tmp_path / "hub")
    outcome = call(capfd, "export", str(hub), "-o", str(tmp_path / "o"), "--engram-inside", "-q")
    assert outcome.code == 2 and "has no Engram tables" in outcome.err


@pytest.mark.slow
def test_a_prompt_with_an_image(exported: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported, tmp_path / "out"))
    content = json.loads((bundle / "tokenizer.json").read_text())
    content["model"]["vocab"]["<image>"] = 319
    content["added_tokens"].append(
        {"id": 319, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    (bundle / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(NotSupported, match=r"token 319, number 5 of the prompt: it stands for an image"):
        api.run(bundle, prompt="see: <image> ok", max_new_tokens=2, check_files=False)


@pytest.mark.slow
def test_a_decoder_that_is_not_there(trained_checkpoint: Path, tmp_path: Path) -> None:
    bundle = api.export(trained_checkpoint, tmp_path / "out", precision="fp32").bundle
    with pytest.raises(NotSupported, match="no decoder that prompts could skip"):
        api.run(bundle.folder, prompt="x", max_new_tokens=2, skip_decoder=True)
