"""Graphs are looked through before a runtime gets them."""

from __future__ import annotations

import os
from collections.abc import Callable

import onnx
import pytest
from onnx import helper

from v4export.errors import BadInput
from v4export.graphs import admitted


def graph(change: Callable[[onnx.TensorProto], None] = lambda _: None, nodes: int = 1) -> onnx.ModelProto:
    weight = onnx.TensorProto(name="w", data_type=1, dims=[2, 2], data_location=onnx.TensorProto.EXTERNAL)
    place(weight, location="weights/a", offset="16", length="16")
    change(weight)
    x, y = (helper.make_tensor_value_info(name, 1, ["B", 2]) for name in "xy")
    made = [helper.make_node("MatMul", ["x", "w"], ["y"]) for _ in range(nodes)]
    return helper.make_model(helper.make_graph(made, "g", [x], [y], [weight]))


def place(weight: onnx.TensorProto, **said: str) -> None:
    known = {entry.key: entry.value for entry in weight.external_data} | said
    del weight.external_data[:]
    for key, value in known.items():
        weight.external_data.add(key=key, value=value)


def inside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph as a branch of an If."""
    branch = helper.make_node("If", ["x"], ["y"], then_branch=model.graph, else_branch=model.graph)
    return helper.make_model(helper.make_graph([branch], "outer", [], []))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(32))
    os.symlink("/etc/passwd", tmp_path / "weights" / "link")
    return tmp_path


WRONG = {
    "up": ({"location": "../a"}, "leads out of the bundle"),
    "absolute": ({"location": "/etc/passwd"}, "leads out of the bundle"),
    "link": ({"location": "weights/link"}, "leads out of its directory"),
    "missing": ({"location": "weights/b"}, "is not there"),
    "behind the end": ({"offset": "17"}, "ends at byte 33, 'weights/a' has 32"),
    "negative": ({"offset": "-16"}, "no offset and length"),
    "not a number": ({"length": "sixteen"}, "no offset and length"),
    "too short": ({"length": "12"}, "has 12 bytes, its shape and type need 16"),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_weights_that_are_not_where_they_may_be(folder, name, nested):
    said, words = WRONG[name]
    model = graph(lambda weight: place(weight, **said))
    onnx.save(inside(model) if nested else model, folder / "model.onnx")
    with pytest.raises(BadInput, match=words):
        admitted.admit(folder / "model.onnx")


def test_sound(folder):
    for model in (graph(), inside(graph())):
        onnx.save(model, folder / "model.onnx")
        admitted.admit(folder / "model.onnx")


def test_shape_that_is_none(folder):
    for dims in ([-2, -2], [2**40] * 70):
        onnx.save(graph(lambda weight, dims=dims: (weight.ClearField("dims"), weight.dims.extend(dims))), folder / "m")
        with pytest.raises(BadInput, match="shape and type need None"):
            admitted.admit(folder / "m")


def test_limits(folder, monkeypatch):
    onnx.save(graph(nodes=11), folder / "model.onnx")
    monkeypatch.setattr(admitted, "MOST_NODES", 10)
    with pytest.raises(BadInput, match="more than 10 nodes"):
        admitted.admit(folder / "model.onnx")
    monkeypatch.setattr(admitted, "MOST_BYTES", 100)
    with pytest.raises(BadInput, match="too large"):
        admitted.admit(folder / "model.onnx")
    with pytest.raises(BadInput, match="cannot read"):
        admitted.admit(folder / "none.onnx")
