"""Model repositories as files; a server has them in test_triton_server.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import onnx
import pytest
from command_line import call

from v4export import api
from v4export.config.sharding import Sharding
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import Bundle
from v4export.runtime.executors import Choice
from v4export.serve.asked import INPUTS, OUTPUTS
from v4export.serve.limits import Limits
from v4export.serve.repository import engine_config, write_repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(trained_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("served") / "tiny"
    return api.export(trained_checkpoint, out, precision="fp32", max_seq_len=512).bundle


@pytest.fixture(scope="module")
def fp8(trained_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("served") / "fp8"
    options = {"precision": "bf16", "state": "fp8", "layers": range(1)}
    return api.export(trained_checkpoint, out, max_seq_len=512, **options).bundle


def parsed(text: str):
    """By Triton's own protobuf, which refuses what it does not know."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def with_engine(bundle: Bundle, backend: str = "tensorrt") -> Bundle:
    """As if one had been built; only its name is read."""
    (bundle.folder / "model.engine").write_bytes(b"plan")
    return replace(bundle, manifest={**bundle.manifest, "engines": {"model.onnx": {"backend": backend}}})


def test_a_repository_is_made_of_a_bundle_and_of_nothing_else(bundle, tmp_path):
    made = write_repository(bundle, tmp_path / "models", name="m", limits=Limits(3, 5, 7))
    assert made.models == ("m",) and not made.chat and made.no_engine == "the bundle has no engine"
    inside = made.folder / "m" / "1" / "bundle"
    names = sorted(p.relative_to(inside) for p in inside.rglob("*"))
    assert names == sorted(p.relative_to(bundle.folder) for p in bundle.folder.rglob("*"))
    assert not any(p.is_symlink() for p in made.folder.rglob("*"))
    weights, mine = (next((folder / "weights").iterdir()) for folder in (inside, bundle.folder))
    assert weights.samefile(mine) and not (inside / "v4export.json").samefile(bundle.folder / "v4export.json")
    Bundle.open(inside).check_files()


def test_its_configuration_is_triton_s(bundle, tmp_path):
    made = write_repository(
        bundle, tmp_path / "models", name="m", limits=Limits(3, 5, 7), max_tokens=11, choice=Choice(threads=2)
    )
    config = parsed((made.folder / "m" / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("m", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [one.name for one in config.input] == list(INPUTS) and all(one.optional for one in config.input)
    assert [one.name for one in config.output] == list(OUTPUTS)
    given = {key: value.string_value for key, value in config.parameters.items()}
    assert given == {
        **{"slots": "3", "queue": "5", "chunk": "7", "max_tokens": "11", "threads": "2", "device": "cpu"},
        **{"executor": "onnxruntime", "cuda_graphs": "1", "kernels": "0", "check_files": "1", "draft_max": "0"},
    }
    cuda = write_repository(bundle, tmp_path / "cuda", choice=Choice(device="cuda"))
    config = parsed((cuda.folder / "tiny" / "config.pbtxt").read_text())
    assert config.parameters["device"].string_value == "cuda"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_an_engine_is_a_model_of_its_own(bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "tiny")
    built = with_engine(replace(bundle, folder=tmp_path / "tiny"))
    made = write_repository(built, tmp_path / "models")
    assert made.models == ("tiny", "tiny-engine") and made.no_engine is None
    assert (made.folder / "tiny-engine" / "1" / "model.engine").read_bytes() == b"plan"
    config = parsed((made.folder / "tiny-engine" / "config.pbtxt").read_text())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.engine")
    graph = onnx.load(bundle.folder / "model.onnx", load_external_data=False).graph
    assert [one.name for one in config.input] == [one.name for one in graph.input]
    assert [one.name for one in config.output] == [one.name for one in graph.output]
    by_name = {one.name: one for one in [*config.input, *config.output]}
    assert list(by_name["input_ids"].dims) == [-1, -1] and list(by_name["position"].dims) == [-1]
    assert list(by_name["state.0.latent"].dims) == [-1, -1, bundle.config.latent_dim]
    assert list(by_name["logits"].dims) == [-1, -1, bundle.config.vocab_size]
    kinds = {name: one.data_type for name, one in by_name.items()}
    types = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name
    assert kinds["input_ids"] == types["TYPE_INT64"].number and kinds["logits"] == types["TYPE_FP32"].number


def test_engines_that_triton_cannot_run(bundle, fp8, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "tiny")
    with pytest.raises(NotSupported, match="tensorrt_rtx"):
        engine_config("m", with_engine(replace(bundle, folder=tmp_path / "tiny"), "tensorrt_rtx"))
    with pytest.raises(NotSupported, match="shared among ranks"):
        engine_config("m", replace(bundle, sharding=Sharding(2, 1, 1)))
    with pytest.raises(NotSupported, match=r"no type for the engine's state\.0\.latent") as found:
        engine_config("m", with_engine(fp8))
    assert found.value.values == "it is FLOAT8E4M3FN"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", 'a"'])
def test_names(bundle, tmp_path, name):
    with pytest.raises(BadInput, match="no name of a model"):
        write_repository(bundle, tmp_path / "models", name=name)
    assert not list(tmp_path.iterdir())


def test_bundles_that_cannot_be_served(bundle, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(bundle.folder, bare)
    (bare / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BadInput, match="has changed"):
        api.package(bare, tmp_path / "models")
    manifest = json.loads((bare / "v4export.json").read_text())
    for name in ("tokenizer.json", "model.onnx"):
        del manifest["files"][name]
        (bare / name).unlink()
    (bare / "v4export.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="no tokenizer"):
        api.package(bare, tmp_path / "models")
    with pytest.raises(BadInput, match="not a bundle"):
        api.package(tmp_path / "nothing", tmp_path / "models")
    assert [one.name for one in tmp_path.iterdir()] == ["bare"]


def test_command(bundle, tmp_path, capfd):
    found = call(capfd, "package", bundle.folder, "--triton", tmp_path / "models", "--slots", 2, "--json")
    assert found.code == 0 and json.loads(found.out)["models"] == ["tiny"]
    again = call(capfd, "package", bundle.folder, "--triton", tmp_path / "models")
    assert again.code == 2 and "exists" in again.err
    text = call(capfd, "package", bundle.folder, "--triton", tmp_path / "more").out
    assert "there is no chat template" in text and "no model of an engine: the bundle has no engine" in text
