"""Engines by the commands and by what Triton's Python backend runs, over a TensorRT that is played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call
from played_tensorrt import TensorRT, played_cuda_graphs, with_engines
from serving import triton_request, triton_utilities

from v4export import api
from v4export.engine.backend import cuda_devices
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import MANIFEST
from v4export.plain import to_json
from v4export.runtime.on_device.device import Device
from v4export.runtime.on_device.loaded import Runtime
from v4export.serve.model import Model

pytestmark = pytest.mark.slow
PROMPT, NEW = "def read_lines(self, path):", 24


@pytest.fixture(scope="module")
def folder(trained_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "tiny"
    bundle = with_engines(api.export(trained_checkpoint, out, precision="fp32", max_seq_len=512).bundle)
    (out / MANIFEST).write_text(to_json(bundle.manifest))
    return out


@pytest.fixture
def played(monkeypatch):
    package = TensorRT()
    indices = []

    def opened(folder, engines, index, cuda_graphs):
        indices.append(index)
        return Runtime(package, Device("cpu"), folder, engines, cuda_graphs)

    monkeypatch.setattr(Runtime, "open", opened)
    with played_cuda_graphs(package) as counted:
        yield counted, indices


@pytest.mark.parametrize("graphs", [True, False])
def test_run(folder, played, capfd, graphs):
    counted, _ = played
    how = ["--prompt", PROMPT, "-n", NEW, "--ignore-eos", "--json"]
    wanted = json.loads(call(capfd, "run", folder, *how).out)
    flags = ["--executor", "tensorrt", *([] if graphs else ["--no-cuda-graphs"])]
    found = json.loads(call(capfd, "run", folder, *how, *flags).out)
    assert (found["text"], found["tokens"]) == (wanted["text"], wanted["tokens"]) and len(found["tokens"]) == NEW
    assert counted.replayed == (NEW - 3 if graphs else 0)


def test_bench(folder, played, capfd):
    found = call(capfd, "bench", folder, "-p", 20, "-n", 6, "-r", 1, "--executor", "tensorrt", "--json", "-q")
    assert found.code == 0 and json.loads(found.out) and played[0].replayed


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has what is to be missing")
def test_a_machine_without_a_gpu_says_so(folder, capfd):
    found = call(capfd, "run", folder, "--prompt", PROMPT, "--executor", "tensorrt")
    assert found.code == 4 and found.out == ""
    assert "no CUDA device to run the engine on" in found.err and "--executor onnxruntime" in found.err


def test_triton(folder, played, tmp_path):
    """The model that a server would load, and its answers to several at once."""
    _, indices = played
    made = api.package(folder, tmp_path / "models", executor="tensorrt", slots=3, chunk=16)
    text = (made.folder / "tiny" / "config.pbtxt").read_text()
    parameters = dict(slots="3", queue="128", chunk="16", draft_max="0", max_tokens="256", threads="0")
    parameters |= dict(executor="tensorrt", device="cuda", cuda_graphs="1", kernels="0", check_files="1")
    for name, value in parameters.items():
        assert f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}' in text
    assert "kind: KIND_GPU" in text and made.models == ("tiny", "tiny-engine")
    config = {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}
    place = {"model_repository": str(made.folder / "tiny"), "model_version": "1", "model_name": "tiny"}
    utilities, answers = triton_utilities()
    model = Model(utilities, {"model_config": json.dumps(config), **place, "model_instance_device_id": "2"})
    prompts = [PROMPT, "class Reader:", "import os", PROMPT[:9]]
    model.execute([triton_request(prompt, NEW, answers) for prompt in prompts])
    assert all(one.wait() for one in answers.values()) and indices == [2]
    model.finalize()
    for prompt in prompts:
        wanted = api.run(folder, prompt=prompt, max_new_tokens=NEW, ignore_eos=True)
        assert (answers[prompt].tokens, answers[prompt].text) == ([*wanted.tokens], wanted.text)


def test_what_cannot_be_packaged(folder, tmp_path):
    with pytest.raises(BadInput, match=r"fewer sequences than there are to be slots\n  8 slots, at most 4 sequences"):
        api.package(folder, tmp_path / "models", executor="tensorrt")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".engine":
            (bare / file.name).symlink_to(file)
    manifest = json.loads((folder / MANIFEST).read_text())
    (bare / MANIFEST).unlink()
    (bare / MANIFEST).write_text(json.dumps({**manifest, "engines": {}}))
    with pytest.raises(NotSupported, match="no engine for --executor tensorrt"):
        api.package(bare, tmp_path / "models", executor="tensorrt")
    assert not (tmp_path / "models").exists()
