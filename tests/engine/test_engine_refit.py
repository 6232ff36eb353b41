"""Engines that get other weights: what is asked of TensorRT, and that nothing but weights may differ."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_graphs import linear, save
from onnx import numpy_helper

from v4export.config.readers import read_config
from v4export.engine.build import build_engine
from v4export.engine.log import Failed, Log
from v4export.engine.options import EngineOptions, engine_of
from v4export.engine.refit import refitted, same_but_weights
from v4export.errors import BadInput, NotSupported
from v4export.precision import PRECISIONS


class Fake:
    """TensorRT, as far as a refit goes; ``answers`` says what goes wrong."""

    SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS")

    def __init__(self, **answers: Any) -> None:
        self.answers, self.calls = {"refittable": True, "parses": True, "missing": [], "refits": True, **answers}, []

    def Runtime(self, logger: Any) -> Any:
        loaded = SimpleNamespace(
            refittable=self.answers["refittable"],
            create_serialization_config=lambda: SimpleNamespace(clear_flag=self.calls.append),
            serialize_with_config=lambda config: b"the engine, refitted",
        )
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.answers.get("engine", loaded))

    def Refitter(self, engine: Any, logger: Any) -> Any:
        return SimpleNamespace(
            get_missing_weights=lambda: self.answers["missing"],
            refit_cuda_engine=lambda: self.calls.append("refit") or self.answers["refits"],
        )

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        error = SimpleNamespace(desc=lambda: "no such weight: W")
        return SimpleNamespace(
            refit_from_file=lambda path: self.calls.append(path) or self.answers["parses"],
            num_errors=1,
            get_error=lambda i: error,
        )


def refit(folder: Path, fake: Fake) -> str:
    (folder / "built.engine").write_bytes(b"the engine")
    return refitted(fake, None, folder / "built.engine", "graph.onnx", folder / "out", Log())


def test_weights_are_read_refitted_and_written_with_the_engine(tmp_path):
    fake = Fake()
    assert len(refit(tmp_path, fake)) == 64
    assert fake.calls == ["graph.onnx", "refit", "EXCLUDE_WEIGHTS"]
    assert (tmp_path / "out").read_bytes() == b"the engine, refitted"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"engine": None}, "cannot be loaded here"),
        ({"refittable": False}, "not built with --refit"),
        ({"parses": False}, "does not take the graph's weights"),
        ({"missing": ["a", "b"]}, "2 of its weights are in no graph"),
        ({"refits": False}, "does not take the graph's weights"),
    ],
)
def test_nothing_is_written_where_it_fails(tmp_path, wrong, why):
    with pytest.raises(Failed) as failed:
        refit(tmp_path, Fake(**wrong))
    assert failed.value.kind == "refit" and why in failed.value.details["why"]
    assert not (tmp_path / "out").exists()


def graphs(folder: Path) -> tuple[Path, Path]:
    """Two folders with a graph each, of weights that differ."""
    paths = []
    for number in (0, 1):
        proto = linear("fp16")
        weights = np.full((256, 200), number + 1, np.float16)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "W"))
        (folder / str(number)).mkdir()
        paths.append(save(proto, folder / str(number), external=True))
    return paths[0], paths[1]


def test_graphs_that_differ_in_weights_alone(tmp_path):
    one, other = graphs(tmp_path)
    assert one.read_bytes() != other.read_bytes() or one.parent != other.parent
    assert same_but_weights(one, other)
    (tmp_path / "wider").mkdir()
    assert not same_but_weights(one, save(linear("fp16", 256, 208), tmp_path / "wider", external=True))


def test_a_machine_without_a_gpu_says_so_and_keeps_the_engine(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    one, other = graphs(tmp_path)
    how = {"precision": PRECISIONS["fp16"], "targets": ["sm86"], "backend": "tensorrt_rtx"}
    build_engine(one, tmp_path / "one.engine", **how)
    before = (tmp_path / "one.engine").read_bytes()
    with pytest.raises(NotSupported, match="cannot be given other weights"):
        build_engine(other, tmp_path / "other.engine", refit_from=tmp_path / "one.engine", **how)
    assert (tmp_path / "one.engine").read_bytes() == before and not (tmp_path / "other.engine").exists()


@pytest.mark.parametrize("there", ["nothing", "a graph", "another graph"])
def test_only_an_engine_of_the_same_graph_is_refitted(tmp_path, there, tiny_checkpoint):
    config = read_config(tiny_checkpoint)
    graph, other = graphs(tmp_path)
    other = other.rename(other.with_name(graph.name))
    if there == "nothing":
        other.unlink()
    elif there == "another graph":
        other.unlink()
        save(linear("fp16", 256, 208), other.parent)
        other.with_suffix(".engine").write_bytes(b"an engine")
    options = EngineOptions(targets=["sm86"], backend="tensorrt_rtx", refit_from=other.parent)
    with pytest.raises(BadInput, match="another graph" if there == "another graph" else "no engine to refit"):
        engine_of(graph, config, 64, PRECISIONS["fp16"], options)
