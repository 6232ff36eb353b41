"""Products with integer matrices through onnxruntime's MatMulNBits, against the portable bodies and plain NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from nbits_graphs import Stored, counts, given, repacked_copy, run

from v4export.checkpoint.narrow import widen
from v4export.graphs.lower import bodies_for_cpu
from v4export.graphs.stamp import portable_bodies
from v4export.plugins.function_body import OPSET, VERSION, Body

N, K = 48, 96
NAME = "model.layers.0.mlp.up_proj.weight"
BF16, FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widened(b: Body, stored: str, w: ir.Value, scale: ir.Value) -> ir.Value:
    """The node that a traced ``Linear`` has."""
    if stored == "int4":
        wide = b.op("TRT_INT4DequantizeLinear", w, scale, domain="trt", axis=1, block_size=32)
    else:
        wide = b.op("TRT_BlockDequantize", w, scale, domain="trt", block_shape=[1, 32], output_dtype=int(BF16))
    wide.dtype, wide.shape = BF16, w.shape
    return wide


def product(b: Body, x: ir.Value, wide: ir.Value, *bias: ir.Value) -> ir.Value:
    assert wide.shape is not None
    y = b.op("Gemm", x, wide, *bias, transB=1)
    y.dtype, y.shape = wide.dtype, ir.Shape([None, wide.shape[0]])
    return y


def wider(b: Body, value: ir.Value) -> ir.Value:
    wide = b.cast(value, FP32)
    wide.dtype, wide.shape = FP32, value.shape
    return wide


def activations(tokens: int) -> np.ndarray:
    x = np.random.default_rng(tokens).normal(size=(tokens, K))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def rel(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_the_matrixs_numbers(tmp_path, stored, bias, tokens, prepack):
    found, b, x = Stored(tmp_path, stored), Body(), given("x", ["M", K], BF16)
    own = np.random.default_rng(3).normal(size=N).astype(ml_dtypes.bfloat16).astype(np.float32) if bias else np.zeros(N)
    added = [found.plain("bias", own, "bfloat16")] if bias else []
    path = found.save(b, [x], [product(b, x, widened(b, stored, *found.matrix(NAME, (N, K))), *added)])
    given_x = activations(tokens)
    wide = widen(found.matrices[NAME], found.format).astype(ml_dtypes.bfloat16).astype(np.float64)
    wanted = given_x @ wide.T + own
    (portable,) = run(bodies_for_cpu(path), tmp_path, {"x": given_x})
    for level, limit in ((0, 2.0**-8), (4, 4e-2)):
        model = repacked_copy(path, level)
        # There is no kernel for eight bits at level 0.
        assert ("MatMulNBits" in counts(model)) == (stored == "int4" or level == 4)
        (got,) = run(model, tmp_path, {"x": given_x}, prepack)
        assert rel(got, wanted) < limit
        assert rel(got, portable) < (2.0**-7 if level == 0 else limit)
        assert (got.astype(ml_dtypes.bfloat16) == got).all()
    if stored == "int8":
        assert (run(repacked_copy(path), tmp_path, {"x": given_x}, prepack)[0] == portable).mean() > 0.99


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_several_products_of_one_matrix_share_it(tmp_path, stored):
    found, b = Stored(tmp_path, stored), Body()
    xs = [given(name, ["M", K], BF16) for name in ("x", "z")]
    wide = widened(b, stored, *found.matrix(NAME, (N, K)))
    path = found.save(b, xs, [product(b, x, wide) for x in xs])
    model = repacked_copy(path, level=4)
    assert counts(model)["MatMulNBits"] == 2
    assert len([n for n in model.graph.initializers if n.endswith(".unsigned")]) == 1
    assert not any(v.dtype in (ir.DataType.INT8, ir.DataType.INT4) for v in model.graph.initializers.values())
    feeds = {"x": activations(3), "z": activations(4)}
    for got, wanted in zip(
        *(run(m, tmp_path, feeds) for m in (repacked_copy(path), bodies_for_cpu(path))), strict=True
    ):
        assert rel(got, wanted) < 2.0**-7


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_a_matrix_that_is_used_otherwise_stays_wide(tmp_path, stored):
    found, b, x = Stored(tmp_path, stored), Body(), given("x", ["M", K], BF16)
    wide = widened(b, stored, *found.matrix(NAME, (N, K)))
    half = b.op("Slice", wide, b.const([0]), b.const([8]), b.const([0]))
    half.dtype, half.shape = BF16, ir.Shape([8, K])
    path = found.save(b, [x], [product(b, x, wide), product(b, x, half)])
    model = repacked_copy(path)
    assert "MatMulNBits" not in counts(model) and not list(tmp_path.glob("weights/*"))
    feeds = {"x": activations(3)}
    for got, wanted in zip(run(model, tmp_path, feeds), run(bodies_for_cpu(path), tmp_path, feeds), strict=True):
        assert rel(got, wanted) < 2.0**-7


@pytest.mark.parametrize("stored", ["int4", "int8"])
def test_a_product_in_float32_stays_one(tmp_path, stored):
    """It would tell that the node does not round integers times multipliers to bfloat16."""
    found, b, x = Stored(tmp_path, stored), Body(), given("x", ["M", K], FP32)
    path = found.save(b, [x], [product(b, x, wider(b, widened(b, stored, *found.matrix(NAME, (N, K)))))])
    model, feeds = repacked_copy(path), {"x": activations(5)}
    assert "MatMulNBits" not in counts(model)
    assert rel(run(model, tmp_path, feeds)[0], run(bodies_for_cpu(path), tmp_path, feeds)[0]) < 2e-6


def test_a_graph_output_keeps_its_name(tmp_path):
    found, b, x = Stored(tmp_path, "int4"), Body(), given("x", ["M", K], BF16)
    y = product(b, x, widened(b, "int4", *found.matrix(NAME, (N, K))))
    y.name = "logits"
    imports = {"": OPSET, "trt": VERSION}
    graph = ir.Graph([x], [y], nodes=b.nodes, initializers=found.values.values(), opset_imports=imports, name="g")
    ir.save(ir.Model(graph, ir_version=10, functions=portable_bodies(b.nodes)), tmp_path / "model.onnx")
    model = repacked_copy(tmp_path / "model.onnx")
    assert [v.name for v in model.graph.outputs] == ["logits"] and counts(model)["MatMulNBits"] == 1
