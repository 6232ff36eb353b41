"""Numbers rounded to E4M3 by a scale: by hand, in PyTorch, and as the nodes that an exporter writes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from one_node import to_torch
from onnx_ir.passes import common

from v4export.graphs.passes.widen import widen
from v4export.plugins import STANDARD
from v4export.plugins.function_body import OPSET, Body
from v4export.plugins.round_to_fp8.onnx import rounded
from v4export.plugins.round_to_fp8.op import round_to_fp8

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ONNX = {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}
#: Every number of E4M3 that is finite, in order.
NUMBERS = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
NUMBERS = NUMBERS[np.isfinite(NUMBERS)]


def values(scale: float, dtype: str) -> np.ndarray:
    """Numbers of all sizes, halves between two numbers of E4M3, and what is beyond the largest."""
    rng = np.random.default_rng(0)
    any_size = rng.normal(size=3000) * 10.0 ** rng.uniform(-5, 3, 3000)
    halves = (NUMBERS[1:] + NUMBERS[:-1]) / 2 * scale
    edges = np.array([0.0, -0.0, 448, 449, 463, 464, 465, 1e4, -448, -465, -1e4]) * scale
    return np.concatenate([any_size, halves, edges]).astype(np.float32).astype(DTYPES[dtype])


def by_hand(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """The nearest number of E4M3, of two that are as near the one whose code is even; float32."""
    wanted = x.astype(np.float32) / scale
    out = np.empty(x.shape, np.float32)
    for i, value in enumerate(wanted):
        distance = np.abs(NUMBERS.astype(np.float64) - np.float64(value))
        nearest = NUMBERS[distance == distance.min()]
        codes = nearest.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        out[i] = nearest[codes % 2 == 0][0] if len(nearest) > 1 else nearest[0]
    return (out * scale).astype(x.dtype).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.037, 3.3e-3])
def test_equation(dtype, scale):
    x = values(scale, dtype)
    found = round_to_fp8(to_torch(x), torch.tensor(scale))
    assert str(found.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(found.float().numpy(), by_hand(x, np.float32(scale)))


def test_no_number_becomes_nan():
    x = torch.tensor([torch.inf, -torch.inf, 1e38, -1e38])
    assert round_to_fp8(x, torch.tensor(0.5)).tolist() == [224.0, -224.0, 224.0, -224.0]


class Rounding(torch.nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_to_fp8(x, scale)


def exported(dtype: str, n: int, scale: float) -> ir.Model:
    """The graph that an exporter makes of the op, its scale stored."""
    table = {op._opoverload: translate for op, translate in STANDARD.items()}
    example = (torch.zeros(n, dtype=getattr(torch, dtype)), torch.tensor(scale))
    program = torch.onnx.export(
        Rounding().eval(), example, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False
    )
    model = program.model
    stored = model.graph.inputs.pop()
    stored.const_value = ir.tensor(np.float32(scale), name=stored.name)
    model.graph.register_initializer(stored)
    return model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """Through onnxruntime on a CPU, 16-bit numbers carried in float32."""
    common.ShapeInferencePass()(model)
    widen(model)
    (y,) = model.graph.outputs
    edge = Body("edge.").cast(y, ir.DataType.FLOAT)
    edge.name, edge.type, edge.shape = "wide", ir.TensorType(ir.DataType.FLOAT), y.shape
    model.graph.append(edge.producer())
    model.graph.outputs[0] = edge
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    name, dtype = model.graph.inputs[0].name, model.graph.inputs[0].dtype
    value = ort.OrtValue.ortvalue_from_numpy(x) if x.dtype == np.float32 else (
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), int(dtype))
    )  # fmt: skip
    return session.run_with_ort_values(["wide"], {name: value})[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_nodes_compute_the_same(dtype):
    scale = 0.037
    x = values(scale, dtype)
    model = exported(dtype, len(x), scale)
    assert [n.op_type for n in model.graph] == ["QuantizeLinear", "DequantizeLinear"]
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT8E4M3FN and model.graph.outputs[0].dtype == ONNX[dtype]
    np.testing.assert_array_equal(run(model, x), round_to_fp8(to_torch(x), torch.tensor(scale)).float().numpy())


def test_body_by_scales_known_at_run_time():
    b = Body()
    x = ir.Value(name="x", shape=ir.Shape(["N"]), type=ir.TensorType(ir.DataType.FLOAT))
    scale = ir.Value(name="scale", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    y = rounded(b, x, scale)
    y.name, y.type, y.shape = "y", x.type, x.shape
    model = ir.Model(ir.Graph([x, scale], [y], nodes=b.nodes, opset_imports={"": OPSET}, name="g"), ir_version=10)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for by in (1.0, 0.037, 3.3e-3):
        given = values(by, "float32")
        (found,) = session.run(None, {"x": given, "scale": np.array(by, np.float32)})
        np.testing.assert_array_equal(found, round_to_fp8(to_torch(given), torch.tensor(by)).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype):
    torch.library.opcheck(round_to_fp8, (torch.randn(3, 4, dtype=dtype), torch.tensor(0.1)))
