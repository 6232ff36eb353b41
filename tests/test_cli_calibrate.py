"""``v4export calibrate``, and ``--calibrate`` of the verbs that export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from command_line import call

from v4export import api, presets
from v4export.checkpoint.activation_scales import FILE, all_scales, read_scales
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom.\n" * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(PROSE)
    return file


@pytest.fixture(scope="module")
def scales(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scales") / "scales.safetensors"
    api.calibrate(tiny_checkpoint, file, text=text, tokens=256, context=64)
    return file


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
def test_a_file_of_scales_and_a_table(tiny_checkpoint, text, tmp_path, capfd, method):
    out = tmp_path / "new" / "scales.safetensors"
    how = ["--method", method, "--tokens", 256, "--context", 64, "--percentile", 99]
    found = call(capfd, "calibrate", tiny_checkpoint, "--text", text, "-o", out, *how)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert found.code == 0 and [f.name for f in out.parent.iterdir()] == [out.name], "no state is left"
    stored = read_scales(out, checkpoint.config)
    said = {"max": "max", "percentile": "percentile 99", "mse": "mse"}[method]
    assert stored.checkpoint == checkpoint.header_hash and stored.made["method"] == said
    lines = found.out.splitlines()
    assert lines[0].split() == ["layer", "reads", "range", "scale", "tokens", "experts", "that", "borrowed"]
    assert len([line for line in lines if "_proj" in line or "mlp.experts" in line]) == len(
        all_scales(checkpoint.config)
    )
    assert f"{out}: {len(stored.values)} scales by {said} over 256 tokens" in found.last


def test_json(tiny_checkpoint, text, tmp_path, capfd):
    out = tmp_path / "scales.safetensors"
    how = ["--tokens", 64, "--context", 64, "--json", "-q"]
    found = json.loads(call(capfd, "calibrate", tiny_checkpoint, "--text", text, "-o", out, *how).out)
    config = Checkpoint.open(tiny_checkpoint).config
    stored = read_scales(out, config)
    assert found["checkpoint"] == stored.checkpoint and found["scales"].keys() == stored.values.keys()
    for name, one in found["scales"].items():
        np.testing.assert_allclose(one["scale"], stored.values[name], rtol=1e-6)
        assert len(one["range"]) == len(one["tokens"]) == max(1, stored.values[name].size)
    assert any(one["borrowed"] for one in found["scales"].values()), "64 tokens do not give every expert 16"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["text", "scales"])
def test_an_export_calibrates_on_the_way(tiny_checkpoint, text, scales, tmp_path, capfd, given, request):
    out = tmp_path / "out"
    file = request.getfixturevalue(given)
    found = call(capfd, "export", tiny_checkpoint, "-o", out, "--precision", "fp8-w8a8", "--calibrate", file)
    assert found.code == 0 and ("calibrate " in found.err) == (given == "text")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    manifest = json.loads((out / "v4export.json").read_text())
    assert manifest["calibration"]["method"] == "percentile 99.99" and "sha256" in manifest["files"][FILE]
    stored = read_scales(out / FILE, Checkpoint.open(tiny_checkpoint).config)
    if given == "scales":
        for name, value in read_scales(scales, Checkpoint.open(tiny_checkpoint).config).values.items():
            np.testing.assert_array_equal(stored.values[name], value)


#: What is asked for, and what the error says.
REFUSED = {
    "nothing to calibrate by": (["--precision", "fp8-w8a8"], r"rounds inputs by scales.*\n.*--calibrate TEXT"),
    "nothing to calibrate": (["--precision", "fp8", "--calibrate", "TEXT"], "rounds no inputs"),
    "no such text": (["--precision", "fp8-w8a8", "--calibrate", "nothing.txt"], r"cannot read nothing\.txt"),
    "no such scales": (["--precision", "fp8-w8a8", "--calibrate", "no.safetensors"], r"cannot read no\.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("verb", ["export", "build"])
def test_exports_that_are_refused(tiny_checkpoint, text, tmp_path, capfd, verb, case):
    arguments, said = REFUSED[case]
    arguments = [text if one == "TEXT" else one for one in arguments]
    engine = ["--no-engine"] if verb == "build" else []
    found = call(capfd, verb, tiny_checkpoint, "-o", tmp_path / "out", *engine, *arguments)
    assert found.code == 2
    assert re.search(said, found.err), found.err
    assert not [*tmp_path.iterdir()]


def test_scales_of_another_checkpoint(scales, tmp_path, capfd):
    other = synth(presets.load("tiny-v3"), tmp_path / "model", seed=1)
    # Headers say nothing of values: a file of another name is another checkpoint.
    (shard,) = other.glob("*.safetensors")
    shard.rename(shard.with_name("other.safetensors"))
    how = ["--precision", "fp8-w8a8", "--calibrate", scales]
    found = call(capfd, "export", other, "-o", tmp_path / "out", *how)
    assert found.code == 2 and "made of another checkpoint" in found.err and not (tmp_path / "out").exists()


BAD = {
    "out exists": ({"out": "text"}, "exists"),
    "no name of scales": ({"out": "scales.bin"}, "no name of a file of scales"),
    "short": ({"tokens": 10}, "does not fill one window"),
    "context": ({"context": 10**6}, "windows cannot have"),
    "percentile": ({"percentile": 20}, "would cut off half"),
    "no text": ({"text": "nothing.txt"}, "cannot read"),
}


@pytest.mark.parametrize("case", BAD)
def test_calibrations_that_are_refused(tiny_checkpoint, text, tmp_path, capfd, case):
    changes, said = BAD[case]
    out = tmp_path / "scales.safetensors"
    if changes.get("out") == "text":
        out.write_text("something of somebody's")
    elif "out" in changes:
        out = tmp_path / str(changes["out"])
    rest = {"tokens": 64, "context": 32, "text": text} | {k: v for k, v in changes.items() if k != "out"}
    options = [part for name, value in rest.items() for part in (f"--{name}", value)]
    found = call(capfd, "calibrate", tiny_checkpoint, "-o", out, *options)
    assert found.code == 2 and said in found.err, found.err
    assert [f.name for f in tmp_path.iterdir()] == (["scales.safetensors"] if case == "out exists" else [])


def test_force_replaces(tiny_checkpoint, text, scales, tmp_path, capfd):
    out = tmp_path / "scales.safetensors"
    out.write_bytes(scales.read_bytes())
    how = ["--text", text, "-o", out, "--tokens", 64, "--context", 32, "--force", "-q"]
    assert call(capfd, "calibrate", tiny_checkpoint, *how).code == 0
    assert out.read_bytes() != scales.read_bytes()
