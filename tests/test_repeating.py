"""Two builds of the same are byte-identical, but for what the manifest names; build --from repeats one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import call

from v4export import api
from v4export.checkpoint.identity import identity
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import read_header
from v4export.errors import BadInput
from v4export.package.bundle import MANIFEST

#: Converted weights, a keep, a shorter model, a verdict.
OPTIONS = ("--precision", "fp8", "--keep", "bf16:*.self_attn.*", "--layers", "0:2", "--max-seq-len", "128")


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def built(hub: Path, out: Path, seed: str, threads: str) -> None:
    """A build in a process of its own, in another folder, with other hashes and threads."""
    out.parent.mkdir()
    command = [sys.executable, "-c", "from v4export.cli import main; main()", "build", str(hub), "-o", str(out)]
    environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "TZ": f"UTC{seed}"}
    subprocess.run([*command, *OPTIONS, "--no-engine", "-q"], check=True, env=environment, cwd=out.parent)


@pytest.fixture(scope="module")
def twice(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twice")
    for name, seed, threads in (("a", "1", "1"), ("b", "7", "2")):
        built(tiny_checkpoint, folder / name / "out", seed, threads)
    return folder


@pytest.mark.slow
def test_two_builds(twice):
    one, two = (twice / name / "out" for name in "ab")
    here, there = files(one), files(two)
    varies = manifest(one)["varies"]
    assert here.keys() == there.keys() and set(varies) == {MANIFEST, "report.json", "report.html"}
    assert {name for name in here if here[name] != there[name]} <= set(varies)
    assert any(name.startswith("weights/converted") for name in here) and "model.onnx" in here


@pytest.mark.slow
def test_from(capfd, twice, tmp_path):
    first, again = twice / "a" / "out", tmp_path / "again"
    done = call(capfd, "build", "--from", first / MANIFEST, "-o", again)
    assert done.code == 0, done.err
    assert "files are byte-identical" in done.out and "IDENTICAL | " in done.last and "DIFFERS" not in done.out
    assert manifest(again)["asked"] == manifest(first)["asked"]
    here, there = files(first), files(again)
    assert {name for name in here if here[name] != there.get(name)} <= set(manifest(first)["varies"])


@pytest.mark.slow
def test_from_a_manifest_of_other_files(capfd, twice, tmp_path):
    """What should be identical and is not is named, with versions that differ, and the exit code is 1."""
    facts = manifest(twice / "a" / "out")
    facts["files"]["model.onnx"]["sha256"] = "0" * 64
    facts["versions"]["onnx"] = "0.1"
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / MANIFEST).write_text(json.dumps(facts))
    done = call(capfd, "build", "--from", tmp_path / "first")
    assert done.code == 1 and "DIFFERS: model.onnx" in done.out and "DIFFERENT | " in done.last
    assert "1 files differ: model.onnx" in done.err and "onnx 0.1 is " in done.err
    assert (tmp_path / "first.again" / "model.onnx").is_file()


@pytest.mark.slow
def test_from_another_checkpoint(capfd, twice, tiny_checkpoint, tmp_path):
    """With the same headers and sizes; nothing is built."""
    hub = Path(shutil.copytree(tiny_checkpoint, tmp_path / "hub"))
    tensor = next(iter(read_header(hub / "model.safetensors")[1].values()))
    data = bytearray((hub / "model.safetensors").read_bytes())
    data[tensor.offset + tensor.nbytes // 2] ^= 1
    (hub / "model.safetensors").write_bytes(data)
    done = call(capfd, "build", hub, "--from", twice / "a" / "out", "-o", tmp_path / "out")
    assert done.code == 2 and "is not the checkpoint that" in done.err and "sampled values" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.slow
def test_options_beside_from(capfd, twice, tmp_path):
    done = call(capfd, "build", "--from", twice / "a" / "out", "--precision", "fp8", "--no-engine")
    assert done.code == 2 and "given: --dtype, --no-engine" in done.err.replace("--precision", "--dtype")


def test_bundle_without_a_record(capfd, tiny_bundle, tmp_path):
    facts = dict(tiny_bundle("fp32").manifest)
    del facts["asked"]
    (tmp_path / MANIFEST).write_text(json.dumps(facts))
    done = call(capfd, "build", "--from", tmp_path)
    assert done.code == 2 and "does not say how to repeat its build" in done.err


def test_file_that_was_read_has_changed(tiny_checkpoint, tmp_path):
    load = tmp_path / "load.json"
    load.write_text(json.dumps({"1": [1] * 16}))
    bundle = api.export(tiny_checkpoint, tmp_path / "out", precision="fp32", expert_load=load).bundle
    load.write_text("{}")
    with pytest.raises(BadInput, match=r"load\.json has changed"):
        api.repeat(bundle, tmp_path / "again")
    load.unlink()
    with pytest.raises(BadInput, match=r"cannot read .*load\.json"):
        api.repeat(bundle, tmp_path / "again")


def test_model_or_from_is_needed(capfd, tmp_path):
    assert "Missing argument 'MODEL'" in call(capfd, "build", "-o", tmp_path / "out").err
    assert "Missing option '-o'" in call(capfd, "build", "hub").err


def test_identity_follows_values_and_headers(tiny_checkpoint, tmp_path):
    first = identity(Checkpoint.open(tiny_checkpoint))
    assert first == identity(Checkpoint.open(tiny_checkpoint))
    hub = Path(shutil.copytree(tiny_checkpoint, tmp_path / "hub"))
    assert identity(Checkpoint.open(hub)) == first | {"path": str(hub.resolve())}
