from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from engine_graphs import OPSETS, dequantize, experts_loop, fp8_linear, ints, linear, model, node, save, tensor, value
from onnx import TensorProto, helper

from v4export.engine.preflight import places, preflight

X = value("x", TensorProto.FLOAT16, ["S", 8192])
Y = value("y", TensorProto.FLOAT16, None)


def rules(proto, **kwargs):
    return {problem.rule for problem in preflight(proto, **kwargs)}


def graph_of(*nodes, initialisers=(), functions=()):
    return model(nodes, [X], [Y], list(initialisers), functions)


@pytest.mark.parametrize("proto", [linear("fp16"), fp8_linear(), experts_loop()], ids=["linear", "fp8", "experts"])
def test_good_graphs_have_no_problem(proto):
    assert preflight(proto) == []


@pytest.mark.parametrize(("k", "found"), [(3840, set()), (3841, {"topk-limit"})])
@pytest.mark.parametrize("form", ["initialiser", "constant", "value_ints"])
def test_topk_limit(k, found, form):
    use = node("TopK", ["x", "k"], ["y", "i"])
    if form == "initialiser":
        proto = graph_of(use, initialisers=[ints("k", [k])])
    else:
        given = {"value": ints("", [k])} if form == "constant" else {"value_ints": [k]}
        proto = graph_of(node("Constant", [], ["k"], **given), use)
    assert rules(proto) == found


@pytest.mark.parametrize(("k", "found"), [(3840, set()), (3841, {"topk-limit"})])
def test_topk_that_takes_all_where_there_are_fewer(k, found):
    """As a body does that selects from a cache: k is the less of a constant and of a size known at run time."""
    body = [
        node("Constant", [], ["most"], value_ints=[k]),
        node("Shape", ["x"], ["size"], start=1),
        node("Min", ["most", "size"], ["k"]),
        node("TopK", ["x", "k"], ["y", "i"]),
    ]
    function = helper.make_function("v4", "Select", ["x"], ["y"], body, OPSETS)
    assert rules(graph_of(node("Select", ["x"], ["y"], domain="v4"), functions=[function])) == found


def test_topk_of_unknown_size():
    assert rules(graph_of(node("Shape", ["x"], ["k"], start=1), node("TopK", ["x", "k"], ["y", "i"]))) == set()


def stack(count: int, rows: int, columns: int, layers: int = 1):
    """Matrices that are stacked inside a function, and inside another function within it."""
    names = [f"m{i}" for i in range(count)]
    joined = node("Concat", ["a", "b"], ["y"], axis=0)
    inner = helper.make_function("v4", "Join", ["a", "b"], ["y"], [joined], OPSETS)
    calls, last = [], names[0]
    for i, name in enumerate(names[1:]):
        calls.append(node("Join", [last, name], [f"s{i}"], domain="v4"))
        last = f"s{i}"
    calls.append(node("Gather", [last, "at"], ["y"], axis=0))
    outer = helper.make_function("v4", "Stack", ["at", *names], ["y"], calls, [*OPSETS])
    weights = []
    for name in names:
        weight = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=[1, rows, columns])
        weight.data_location = TensorProto.EXTERNAL
        weights.append(weight)
    nodes = [node("Stack", ["at", *names], [f"y{i}"], domain="v4") for i in range(layers)]
    at = value("at", TensorProto.INT64, ["M"])
    return model(nodes, [at], [value("y0", TensorProto.FLOAT16, None)], weights, [outer, inner])


@pytest.mark.parametrize(("rows", "found"), [(2**13 - 1, 0), (2**13, 1)])
def test_tensors_that_only_a_body_makes(rows, found):
    """4 matrices of rows * 2**16 numbers; layers that are alike are looked at once."""
    problems = [p for p in preflight(stack(4, rows, 2**16, layers=3)) if p.rule == "large-tensor"]
    assert len(problems) == found
    for problem in problems:
        assert problem.severity == "error" and problem.where == "Stack_y0"
        assert "[4, 8192, 65536] has 2147483648 elements, more than 2147483647" in problem.message


def test_topk_outputs_must_be_named():
    proto = graph_of(helper.make_node("TopK", ["x", "k"], ["", "i"]), initialisers=[ints("k", [1])])
    assert rules(proto) == {"unnamed-output"}


@pytest.mark.parametrize("op", ["NonZero", "Unique", "Compress", "BitShift"])
def test_unsupported(op):
    (problem,) = preflight(graph_of(node(op, ["x"], ["y"])))
    assert problem.severity == "error" and op in problem.message and problem.fix


def test_standard_tensorrt_has_nonzero():
    assert rules(graph_of(node("NonZero", ["x"], ["y"])), backend="tensorrt") == set()


@pytest.mark.parametrize(("reduction", "found"), [("none", set()), ("add", {"scatter-reduction"})])
def test_scatter(reduction, found):
    assert rules(graph_of(node("ScatterND", ["x", "i", "u"], ["y"], reduction=reduction))) == found


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes", "found"),
    [
        (["q", "k", "v", "mask"], ["y"], {}, set()),
        (["q", "k", "v", "", "", "", "n"], ["y"], {}, {"attention-dropped-input"}),
        (["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"], {}, {"attention-cache"}),
        (["q", "k", "v"], ["y"], {"softcap": 30.0}, {"attention-softcap"}),
    ],
)
def test_attention(inputs, outputs, attributes, found):
    assert rules(graph_of(node("Attention", inputs, outputs, **attributes))) == found


def test_looks_inside_functions_and_subgraphs():
    inner = helper.make_graph(
        [node("NonZero", ["x"], ["inside"])], "then", [], [value("inside", TensorProto.INT64, None)]
    )
    other = helper.make_graph([node("Identity", ["x"], ["else"])], "else", [], [value("else", TensorProto.INT64, None)])
    function = helper.make_function(
        "v4", "Hidden", ["x", "c"], ["y"], [node("If", ["c"], ["y"], then_branch=inner, else_branch=other)], OPSETS
    )
    proto = graph_of(node("Hidden", ["x", "c"], ["y"], domain="v4"), functions=[function])
    (problem,) = preflight(proto)
    assert problem.where == "v4::Hidden/If_y/then_branch/NonZero_inside"
    assert sorted(place.node.op_type for place in places(proto)) == ["Hidden", "Identity", "If", "NonZero"]


def test_control_flow_inside_an_if():
    signature = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
    body = helper.make_graph([node("Identity", ["go"], ["g"])], "body", signature, [value("g", TensorProto.BOOL, [])])
    then = helper.make_graph([node("Loop", ["n", "c"], ["l"], body=body)], "then", [], [])
    other = helper.make_graph([node("Identity", ["x"], ["e"])], "else", [], [])
    assert rules(graph_of(node("If", ["c"], ["y"], then_branch=then, else_branch=other))) == {"control-flow-in-if"}


def test_loops():
    body = helper.make_graph(
        [node("Identity", ["go"], ["g"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])],
        [value("g", TensorProto.BOOL, [])],
    )
    assert rules(graph_of(node("Loop", ["n", "c"], ["y"], body=body))) == set()
    assert rules(graph_of(node("Loop", ["n", ""], ["y"], body=body))) == {"loop-without-condition"}
    function = helper.make_function(
        "v4", "Repeat", ["n", "c"], ["y"], [node("Loop", ["n", "c"], ["y"], body=body)], OPSETS
    )
    calls = [node("Repeat", ["n", "c"], [name], domain="v4") for name in "ab"]
    assert rules(graph_of(*calls, functions=[function])) == {"several-loops"}


@pytest.mark.parametrize(
    ("domain", "name", "found"),
    [
        ("v4", "MoeExperts", set()),
        ("v4", "Swish", {"builtin-name"}),
        ("v4", "TRT_MoE", {"builtin-name"}),
        ("v4", "TRT_BlockDequantize", {"builtin-name"}),
        ("trt", "TRT_BlockDequantize", set()),
    ],
)
def test_function_names(domain, name, found):
    function = helper.make_function(domain, name, ["x"], ["y"], [node("Identity", ["x"], ["y"])], OPSETS)
    assert rules(graph_of(node(name, ["x"], ["y"], domain=domain), functions=[function])) == found


def test_quantised_weights_are_dequantised_first():
    weights = [tensor(name, (256, 256), ml_dtypes.float8_e4m3fn) for name in "ab"]
    proto = graph_of(
        node("Concat", ["a", "b"], ["ab"], axis=0), dequantize("ab", "s", "y", [128, 128]), initialisers=weights
    )
    assert rules(proto) == {"quantized-before-dequantize"}


def test_initialisers():
    huge = onnx.TensorProto(name="huge", data_type=TensorProto.FLOAT16, dims=[2**16, 2**16])
    huge.data_location = TensorProto.EXTERNAL
    scale = onnx.TensorProto(name="scale", data_type=TensorProto.FLOAT8E8M0, dims=[2], raw_data=b"\x7f\x7f")
    found = {p.where: (p.severity, p.rule) for p in preflight(graph_of(initialisers=[huge, scale]))}
    assert found == {"huge": ("warning", "large-initialiser"), "scale": ("error", "unreadable-type")}


def test_external_data_is_not_opened(tmp_path: Path):
    path = save(linear("fp16"), tmp_path, external=True)
    (tmp_path / "weights.bin").unlink()
    assert preflight(path) == []
    assert np.prod(onnx.load(path, load_external_data=False).graph.initializer[0].dims) == 256 * 200


@pytest.mark.parametrize(("name", "after", "found"), [("c", True, True), ("c", False, False), ("d", True, False)])
def test_a_constant_behind_a_call_that_has_one_of_its_name(name, after, found):
    """And what the parser makes of it, which is to read the function's."""
    inner = [node("Constant", [], ["c"], value_ints=[0]), node("Unsqueeze", ["x", "c"], ["y"])]
    function = helper.make_function("v4", "Widen", ["x"], ["y"], inner, OPSETS)
    call = node("Widen", ["x"], ["h"], domain="v4")
    own = node("Constant", [], [name], value_ints=[2])
    nodes = [call, own] if after else [own, call]
    proto = graph_of(*nodes, node("Unsqueeze", ["h", name], ["y"]), functions=[function])
    assert rules(proto) == ({"constant-name"} if found else set())
    trt = pytest.importorskip("tensorrt_rtx")
    network = trt.Builder(logger := trt.Logger(trt.Logger.INTERNAL_ERROR)).create_network(0)
    assert trt.OnnxParser(network, logger).parse(proto.SerializeToString())
    assert network.get_output(0).shape[0] == 1 and network.get_output(0).shape[1 if found else 2] == 1
