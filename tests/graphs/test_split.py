"""Graphs in pieces compute what they do whole."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from v4export.graphs.split import segments, split


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "trt" : 1]>\n{text}')


WHOLE = """
g (float[M, 4] x, bool flag) => (float[M, 4] early, float[M, 4] y)
<float[4] w = {1, 2, 3, 4}>
{
    one = Constant <value = float {1}> ()
    a = Mul(x, w)
    early = Add(a, one)
    b = Add(a, one)
    s = SUM(b)
    c = Add(s, one)
    d = Add(c, a)
    t = SUM(d)
    e = If (flag) <
        then_branch = yes () => (float[M, 4] u) { u = Add(t, a) },
        else_branch = no () => (float[M, 4] v) { v = Sub(t, c) }
    >
    y = Mul(e, w)
}
"""


def run(model: onnx.ModelProto, feeds):
    session = ort.InferenceSession(onnx.shape_inference.infer_shapes(model).SerializeToString())
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feeds[v.name] for v in session.get_inputs()}), strict=True))


@pytest.mark.parametrize("flag", [True, False])
def test_segments_with_sums_between_them(flag):
    """Two ranks with inputs of their own, in step, beside the whole graph over both."""
    given = [{"x": np.full((2, 4), value, np.float32), "flag": np.array(flag)} for value in (1, 5)]
    model = parse(
        WHOLE.replace("SUM(b)", "trt.DistCollective <nb_rank = 2> (b)").replace("SUM(d)", "trt.DistCollective (d)")
    )
    parts = segments(model)
    assert [part.sums for part in parts] == [(("b", "s"),), (("d", "t"),), ()]
    for part in parts:
        onnx.checker.check_model(part.model)
        assert not any(node.op_type == "DistCollective" for node in part.model.graph.node)
    known = [dict(one) for one in given]
    for part in parts:
        for one in known:
            one |= run(part.model, one)
        for summand, total in part.sums:
            both = sum(one[summand] for one in known)
            for one in known:
                one[total] = both
    a = [one["x"] * np.arange(1, 5, dtype=np.float32) for one in given]
    s = sum(a) + 2
    t = sum(s + 1 + one for one in a)
    for one, own in zip(known, a, strict=True):
        assert np.array_equal(one["early"], own + 1)
        assert np.array_equal(one["y"], ((t + own) if flag else (t - s - 1)) * np.arange(1, 5))


def test_constants_are_made_where_they_are_read_and_nothing_is_kept_in_vain():
    model = parse(WHOLE.replace("SUM(b)", "trt.DistCollective (b)").replace("SUM(d)", "trt.DistCollective (d)"))
    first, second, last = (part.model.graph for part in segments(model))
    assert [v.name for v in first.input] == ["x"] and {v.name for v in first.output} == {"a", "early", "b"}
    assert "one" in {n for node in second.node for n in node.output} and [v.name for v in second.input] == ["s", "a"]
    assert {v.name for v in last.input} == {"flag", "t", "a", "c"} and [t.name for t in last.initializer] == ["w"]


def test_pieces_by_a_rule_of_ones_own():
    model = onnx.shape_inference.infer_shapes(parse(WHOLE.replace("SUM(b)", "Neg(b)").replace("SUM(d)", "Neg(d)")))
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "flag": np.array(True)}
    halves = split(
        model, lambda node: None if node.op_type == "Constant" else int(node.output[0] in ("t", "e", "y")), 2
    )
    known = dict(feeds)
    for half in halves:
        known |= run(half, known)
    for name, value in run(model, feeds).items():
        assert np.array_equal(known[name], value)
    assert [v.name for v in halves[1].graph.input] == ["flag", "a", "c", "d"]


def test_functions_go_where_they_are_called():
    body = helper.make_function(
        "v4", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 23)]
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["a"], domain="v4", name="1"),
        helper.make_node("Neg", ["a"], ["y"], name="2"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M"]) for name in "xya"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:2], value_info=value[2:])
    model = helper.make_model(
        graph, functions=[body], opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("v4", 1)]
    )
    first, second = split(model, lambda node: int(node.name) - 1, 2)
    assert len(first.functions) == 1 and not second.functions
