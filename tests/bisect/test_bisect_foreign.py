"""Foreign graphs: where they part is named, by name and by place, and what cannot be compared is said."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from chains import STEPS, WIDTH, chain
from onnx import TensorProto, helper

from v4export import api
from v4export.bisect import runners
from v4export.bisect.graph import Graph
from v4export.bisect.search import Pair
from v4export.errors import BadInput, NotSupported, NumbersDiffer

pytest.importorskip("polygraphy")


def test_equal_graphs_do_not_part(tmp_path):
    found = api.bisect(chain(tmp_path / "a.onnx"), against=chain(tmp_path / "b.onnx"))
    assert not found.parted and found.node is None and found.text().startswith("NO DIFFERENCE beyond limits: ")
    found.check()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("prefix", ["", "other_"])
def test_the_first_wrong_node_is_named(tmp_path, step, prefix):
    wrong = {step: "Sigmoid", STEPS - 1: "Sigmoid"}
    found = api.bisect(
        chain(tmp_path / "a.onnx", wrong=wrong, prefix=prefix), against=chain(tmp_path / "b.onnx"), seed=step
    )
    assert found.node.name == f"{prefix}activation{step}" and not found.node.between
    assert found.node.causes == ("it is Sigmoid, the reference has Tanh",)
    with pytest.raises(NumbersDiffer, match=f"part at node {prefix}activation{step} of a.onnx"):
        found.check()


def test_a_wrong_weight_names_its_node(tmp_path):
    found = api.bisect(chain(tmp_path / "a.onnx", change=1.001), against=chain(tmp_path / "b.onnx"))
    assert found.node.name == "product2" and found.node.causes == ("weight w2 has other bytes",)
    assert found.node.differences[0].rel == pytest.approx(1e-3, rel=0.01)


def test_what_rounding_explains_is_no_difference(tmp_path):
    found = api.bisect(chain(tmp_path / "a.onnx", change=1 + 2e-7), against=chain(tmp_path / "b.onnx"))
    assert not found.parted


def test_weights_in_files_are_read_and_never_from_elsewhere(tmp_path):
    for name, change in {"a": 1.01, "b": 1.0}.items():
        (tmp_path / name).mkdir()
        model = onnx.load(chain(tmp_path / f"{name}.onnx", change=change))
        onnx.save(model, tmp_path / name / "g.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    wrong, sound = (tmp_path / name / "g.onnx" for name in "ab")
    assert api.bisect(wrong, against=sound).node.name == "product2"
    model = onnx.load(wrong, load_external_data=False)
    for tensor in model.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "../b/w.bin"
    onnx.save(model, wrong)
    with pytest.raises(BadInput, match="is not in"):
        api.bisect(wrong, against=sound)


def test_a_node_that_cannot_run_is_where_they_part(tmp_path):
    model = onnx.load(chain(tmp_path / "a.onnx"))
    next(t for t in model.graph.initializer if t.name == "w3").CopyFrom(
        onnx.numpy_helper.from_array(np.zeros((WIDTH + 1, WIDTH), np.float32), "w3")
    )
    onnx.save(model, tmp_path / "a.onnx")
    found = api.bisect(tmp_path / "a.onnx", against=chain(tmp_path / "b.onnx"))
    assert found.node.name == "product3" and "MatMul" in found.node.differences[0].note


def test_a_node_that_the_reference_lacks_is_told(tmp_path):
    model = onnx.load(chain(tmp_path / "a.onnx"))
    node = next(n for n in model.graph.node if n.name == "sum1")
    node.input[0] = "doubled"
    model.graph.node.insert(3, helper.make_node("Add", ["a0", "a0"], ["doubled"], name="more"))
    onnx.save(model, tmp_path / "a.onnx")
    found = api.bisect(tmp_path / "a.onnx", against=chain(tmp_path / "b.onnx"))
    assert found.unmatched == ("more",) and "without a counterpart" in found.text()
    assert found.node.name == "sum1" and "more" in found.node.between
    assert found.node.causes == ("input 0 is doubled, the reference has a0",)


def test_inputs_of_a_file_and_of_other_names(tmp_path):
    wrong, sound = chain(tmp_path / "a.onnx", wrong={2: "Relu"}, inputs="tokens"), chain(tmp_path / "b.onnx")
    np.savez(tmp_path / "in.npz", x=np.ones((3, WIDTH), np.float32))
    assert api.bisect(wrong, against=sound, inputs=tmp_path / "in.npz").node.name == "activation2"
    np.savez(tmp_path / "in.npz", z=np.ones(3))
    with pytest.raises(BadInput, match="lacks inputs"):
        api.bisect(wrong, against=sound, inputs=tmp_path / "in.npz")


def test_graphs_with_other_inputs_are_refused(tmp_path):
    model = onnx.load(chain(tmp_path / "a.onnx"))
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(BadInput, match="different inputs"):
        api.bisect(tmp_path / "a.onnx", against=chain(tmp_path / "b.onnx"))


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff no graph")
    for subject, against in [("a.onnx", "a.onnx"), ("none.onnx", None), ("folder", None)]:
        with pytest.raises(BadInput):
            api.bisect(tmp_path / subject, against=against and tmp_path / against)


def test_probes_are_few_and_mark_no_more_than_a_cut(tmp_path):
    ran: list[onnx.ModelProto] = []

    def counted(model: onnx.ModelProto) -> runners.Execute:
        ran.append(model)
        return runners.by_polygraphy(tmp_path)(model)

    models = [onnx.load(chain(tmp_path / "a.onnx")), onnx.load(chain(tmp_path / "b.onnx", wrong={4: "Sigmoid"}))]
    pair = Pair(*(Graph(model, counted, tmp_path) for model in models), exact=True)
    pair.feed({"x": np.ones((2, WIDTH), np.float32)})
    nodes = models[0].graph.node
    found = pair.narrow(0, len(nodes), range(len(nodes)))
    assert [models[1].graph.node[i].name for i in found.nodes] == ["activation4"]
    assert len(ran) <= 4 * (1 + math.ceil(math.log2(len(nodes))))
    assert max(len(model.graph.output) for model in ran) <= 2  # a step's input and its product


@pytest.mark.parametrize("passed", [0, 1, 2])
def test_what_rounding_explains_does_not_hide_what_is_behind(tmp_path, monkeypatch, passed):
    monkeypatch.setattr("v4export.bisect.search.PASSED", passed)
    wrong = onnx.load(chain(tmp_path / "a.onnx", change=1 + 2e-7, wrong={4: "Sigmoid"}))
    sound = onnx.load(chain(tmp_path / "b.onnx"))
    run = runners.by_polygraphy(tmp_path)
    pair = Pair(Graph(sound, run, tmp_path), Graph(wrong, run, tmp_path), exact=True)
    pair.feed({"x": np.ones((2, WIDTH), np.float32)})
    found, ahead = pair.search(0, len(sound.graph.node), ())
    assert [wrong.graph.node[i].name for i in found.nodes] == ["activation4"]
    assert [wrong.graph.node[i].name for one in ahead for i in one.nodes] == ["product2"][: min(passed, 1)]


@pytest.fixture
def stand_in(monkeypatch):
    """What polygraphy has of TensorRT, computed by onnxruntime, but for one thing: its Tanh is a Sigmoid."""

    class Profile(dict):
        def add(self, name, low, opt, high):
            assert low == opt == high
            self[name] = opt

    def engine(network, config):
        assert config["profiles"][0].keys() == {v.name for v in network.graph.input} and not network.functions
        for node in network.graph.node:
            node.op_type = "Sigmoid" if node.op_type == "Tanh" else node.op_type
        return onnxruntime.InferenceSession(network.SerializeToString())

    class Runner:
        def __init__(self, session):
            self.session = session

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def infer(self, feed):
            names = [value.name for value in self.session.get_outputs()]
            return dict(zip(names, self.session.run(names, feed), strict=True))

    def network(data, strongly_typed):
        assert strongly_typed
        return onnx.load_from_string(data)

    trt = SimpleNamespace(
        Profile=Profile,
        NetworkFromOnnxBytes=network,
        EngineFromNetwork=engine,
        CreateConfig=lambda profiles: {"profiles": profiles},
        TrtRunner=Runner,
    )
    real = runners.polygraphy
    monkeypatch.setattr(runners, "polygraphy", lambda name: trt if name == "trt" else real(name))
    monkeypatch.setattr(runners, "find_spec", lambda name: object())


def test_an_engine_that_computes_otherwise(tmp_path, stand_in):
    found = api.bisect(chain(tmp_path / "a.onnx"), engine=True)
    assert found.node.name == "activation0" and found.node.causes == ()
    assert "by TensorRT and by onnxruntime" in found.compared
    assert not api.bisect(chain(tmp_path / "b.onnx", wrong=dict.fromkeys(range(STEPS), "Relu")), engine=True).parted


def test_engines_need_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setattr(runners, "find_spec", lambda name: None)
    with pytest.raises(NotSupported, match="tensorrt"):
        api.bisect(chain(tmp_path / "a.onnx"), engine=True)
    with pytest.raises(BadInput, match="not both"):
        api.bisect(chain(tmp_path / "a.onnx"), engine=True, against=tmp_path / "a.onnx")
