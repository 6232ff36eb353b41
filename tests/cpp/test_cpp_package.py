"""What a C++ package has in it, and what is not packaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call
from cpp_runner import TOOLS, package
from small_models import small

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.cpp.describe import describe
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cpp.md"


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return tiny_bundle("fp32")


def facts(bundle: Bundle) -> list[str]:
    return describe(bundle, [5], {7: "no text"})["model.txt"].decode().splitlines()


def test_verb(capfd, bundle, tmp_path):
    shown = call(capfd, "package", bundle.folder, "--cpp", tmp_path / "cpp")
    assert shown.code == 0, shown.err
    assert "cmake -S" in shown.out and "--ids" in shown.out and "thoughts" not in shown.out
    found = json.loads(call(capfd, "package", bundle.folder, "--cpp", tmp_path / "again", "--json").out)
    assert found["folder"] == str(tmp_path / "again") and {"CMakeLists.txt", "src/engram.hpp"} <= set(found["files"])
    assert all((tmp_path / "again" / name).is_file() for name in found["files"])
    assert not any("cmake_build" in name or "pyc" in name for name in found["files"])


def test_verb_refuses(capfd, bundle, tmp_path):
    both = ("--cpp", tmp_path / "cpp", "--triton", tmp_path / "triton")
    assert all("or --cpp DIR" in call(capfd, "package", bundle.folder, *given).err for given in ((), both))
    (tmp_path / "there").mkdir()
    shown = call(capfd, "package", bundle.folder, "--cpp", tmp_path / "there")
    assert shown.code == 2 and "exists" in shown.err and not list((tmp_path / "there").iterdir())
    shown = call(capfd, "package", tmp_path, "--cpp", tmp_path / "new")
    assert shown.code == 2 and "is not a bundle" in shown.err and not (tmp_path / "new").exists()


def test_description(bundle):
    found = facts(bundle)
    assert found[0] == "format 1"
    assert {"graph bundle model.cpu.onnx", "vocab 320", "limit 1024", "stop 5", "refuse 7 no text"} <= set(found)
    state = [line for line in found if line.startswith("state ")]
    assert state[0] == "state float32 40 1 0 0 state.0.latent new_state.0.latent" and len(state) == 3
    files = {line.split(maxsplit=2)[2]: int(line.split()[1]) for line in found if line.startswith("file ")}
    assert "model.cpu.onnx" in files and any(name.startswith("weights/") for name in files)
    assert all((bundle.folder / name).stat().st_size == size for name, size in files.items())


def test_an_engine_is_described(bundle):
    assert not any(line.startswith("engine ") for line in facts(bundle))
    files = {**bundle.manifest["files"], "model.engine": {"bytes": 7}}
    assert "engine 7 model.engine" in facts(replace(bundle, manifest={**bundle.manifest, "files": files}))


def test_inputs_that_it_does_not_know_are_refused(bundle, monkeypatch):
    monkeypatch.setattr("v4export.cpp.describe._ALWAYS", ("input_ids", "logits_at"))
    with pytest.raises(NotSupported, match=r"(?s)cannot run.*position"):
        facts(bundle)


def test_ranks_are_refused(bundle):
    with pytest.raises(NotSupported, match="runs no ranks"):
        facts(replace(bundle, sharding=object()))


def test_a_broken_graph_is_refused(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    (tmp_path / "bundle" / "model.cpu.onnx").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="cannot read"):
        facts(Bundle.open(tmp_path / "bundle"))


@pytest.mark.slow
def test_rows_of_a_type_that_it_does_not_make_are_refused(tmp_path):
    checkpoint = synth(small("tiny-v4.1"), tmp_path / "hub")
    made = api.export(checkpoint, tmp_path / "out", precision="fp16", max_seq_len=64).bundle
    with pytest.raises(NotSupported, match="no rows of this type"):
        facts(made)


@pytest.mark.slow
def test_thoughts_are_left_out_and_said_to_be(capfd, tmp_path):
    checkpoint = synth(replace(presets.load("tiny-v3"), reasoning=Reasoning(1, 3)), tmp_path / "hub")
    made = api.export(checkpoint, tmp_path / "out", precision="fp32", max_seq_len=64, layers=range(1)).bundle
    assert "--think off" in call(capfd, "package", made.folder, "--cpp", tmp_path / "cpp").out
    assert [line.split()[-2] for line in facts(made) if line.startswith("state ")] == ["state.0.latent"]


def test_without_headers_cmake_says_so(tmp_path, bundle):
    if not all(map(shutil.which, TOOLS)):
        pytest.skip("there is no cmake or no g++")
    # It looks for headers below an empty folder alone.
    nowhere = [f"-DCMAKE_FIND_ROOT_PATH={tmp_path}", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"]
    words = ["cmake", "-S", package(bundle), "-B", tmp_path / "build", *nowhere]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert done.returncode != 0 and "There is no onnxruntime_c_api.h" in done.stderr
