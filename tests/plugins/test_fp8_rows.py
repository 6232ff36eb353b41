"""Numbers as E4M3 and back: the torch ops, and the standard nodes that they become, against every number there is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from literal_rows import NUMBERS, nearest
from onnx import TensorProto, helper

from v4export.plugins.fp8_rows.op import from_fp8, to_fp8

SORTED = np.unique(NUMBERS)
MIDDLES = (SORTED[1:] + SORTED[:-1]) / 2
#: Every number, every tie, and what is next to them.
X = np.concatenate(
    [SORTED, MIDDLES, np.nextafter(MIDDLES.astype(np.float32), 1e9), np.nextafter(MIDDLES.astype(np.float32), -1e9)]
).astype(np.float32)
WANTED = np.array([nearest(float(x)) for x in X], np.float32)


def test_to_the_nearest_and_back():
    narrow = to_fp8(torch.from_numpy(X))
    assert narrow.dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(from_fp8(narrow).numpy(), WANTED)


@pytest.mark.parametrize("x", [449.0, 470.0, 1e30, torch.inf])
def test_beyond_the_largest_it_is_the_largest(x: float):
    assert from_fp8(to_fp8(torch.tensor([x, -x]))).tolist() == [448.0, -448.0]


def test_nan():
    assert from_fp8(to_fp8(torch.tensor([torch.nan]))).isnan().all()


def test_the_nodes_do_the_same():
    """As onnxruntime runs them, E4M3 between them as an output of the graph."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one"], ["narrow"], output_dtype=TensorProto.FLOAT8E4M3FN),
        helper.make_node("DequantizeLinear", ["narrow", "one"], ["back"]),
    ]
    values = {"x": TensorProto.FLOAT, "narrow": TensorProto.FLOAT8E4M3FN, "back": TensorProto.FLOAT}
    x, *outputs = (helper.make_tensor_value_info(name, kind, ["n"]) for name, kind in values.items())
    graph = helper.make_graph(nodes, "g", [x], outputs, [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = np.concatenate([X, np.array([449, 470, 1e30, -1e30], np.float32)])
    wanted = np.concatenate([WANTED, np.array([448, 448, 448, -448], np.float32)])
    binding, narrow = session.io_binding(), np.empty(len(given), ml_dtypes.float8_e4m3fn)
    binding.bind_input("x", "cpu", 0, np.float32, given.shape, given.ctypes.data)
    binding.bind_output("narrow", "cpu", 0, TensorProto.FLOAT8E4M3FN, narrow.shape, narrow.ctypes.data)
    binding.bind_output("back", "cpu")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[1].numpy(), wanted)
    np.testing.assert_array_equal(narrow.astype(np.float32), wanted)
