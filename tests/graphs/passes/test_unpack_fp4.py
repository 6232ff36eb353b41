"""The pass that widens packed E2M1 with a table, against ml_dtypes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import common

from v4export.graphs.passes.unpack_fp4 import unpack_fp4
from v4export.graphs.stamp import portable_bodies
from v4export.plugins.function_body import OPSET, Body

FP4_BLOCK = 32

#: Every byte, once for each power of two that a checkpoint's E8M0 byte can mean.
EXPONENTS = np.arange(-127, 128)
BYTES = np.tile(np.arange(256, dtype=np.uint8), (len(EXPONENTS), 1))
COLUMNS = 2 * BYTES.shape[1]


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def stored(name: str, array: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...], folder: Path | None) -> ir.Value:
    """A tensor of the bytes of ``array``, in the graph or somewhere in a file."""
    if folder is None:
        return initializer(name, ir.Tensor(array.view(dtype.numpy()).reshape(shape), dtype, name=name))
    content = b"odd" + array.tobytes() + b"end"
    (folder / f"{name}.bin").write_bytes(content)
    tensor = ir.ExternalTensor(f"{name}.bin", 3, array.nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=folder)
    return initializer(name, tensor)


def unpacked(packed: ir.Value, scale: np.ndarray, folder: Path, dtype: ir.DataType) -> np.ndarray:
    """What a TRT_BlockDequantize node's body makes of it once lowered, widened to float32."""
    b = Body()
    scales = initializer("scale", ir.tensor(scale, name="scale"))
    block = [1] * (packed.shape.rank() - 1) + [FP4_BLOCK]
    wide = b.op("TRT_BlockDequantize", packed, scales, domain="trt", block_shape=block, output_dtype=int(dtype))
    wide.dtype = dtype
    out = b.cast(wide, ir.DataType.FLOAT)
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, packed.shape
    imports = {"": OPSET, "trt": 1}
    graph = ir.Graph([], [out], nodes=b.nodes, initializers=[packed, scales], opset_imports=imports, name="g")
    model = ir.Model(graph, ir_version=10, functions=portable_bodies(b.nodes))
    common.InlinePass()(model)
    assert unpack_fp4(model)
    assert not unpack_fp4(model)
    assert "FLOAT4E2M1" not in {v.dtype.name for v in model.graph.initializers.values()}
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"]).run(None, {})[0]


def e2m1(packed: np.ndarray) -> np.ndarray:
    """The numbers of bytes [.., n], float32 [.., 2n], as ml_dtypes reads them."""
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@pytest.mark.parametrize("in_file", [True, False], ids=["in a file", "in memory"])
def test_every_byte_and_every_power_of_two(tmp_path, in_file):
    scale = np.ldexp(np.ones((len(EXPONENTS), COLUMNS // FP4_BLOCK)), EXPONENTS[:, None]).astype(ml_dtypes.bfloat16)
    shape = (len(EXPONENTS), COLUMNS)
    content = BYTES if in_file else np.stack([BYTES & 15, BYTES >> 4], -1)
    packed = stored("w", content, ir.DataType.FLOAT4E2M1, shape, tmp_path if in_file else None)
    with np.errstate(over="ignore"):
        wanted = (e2m1(BYTES).astype(np.float64) * np.repeat(scale.astype(np.float64), FP4_BLOCK, 1)).astype(np.float32)
    got = unpacked(packed, scale, tmp_path, ir.DataType.FLOAT)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("scale_type", [np.float16, np.float32, ml_dtypes.bfloat16], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("output", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_types(tmp_path, scale_type, output):
    """A leading 1, as experts have it, and any type of multipliers and of the result."""
    exponents = np.random.default_rng(0).integers(-8, 4, (1, 8, COLUMNS // FP4_BLOCK))
    scale = np.ldexp(1.0, exponents).astype(scale_type)
    packed = stored("w", BYTES[:8], ir.DataType.FLOAT4E2M1, (1, 8, COLUMNS), tmp_path)
    wanted = e2m1(BYTES[:8])[None] * np.repeat(scale.astype(np.float32), FP4_BLOCK, 2)
    np.testing.assert_array_equal(unpacked(packed, scale, tmp_path, output), wanted)


def test_other_matrices_are_left_alone(tmp_path):
    b = Body()
    packed = stored("w", np.zeros((2, 32), np.int8), ir.DataType.INT8, (2, 32), tmp_path)
    out = b.cast(packed, ir.DataType.FLOAT)
    graph = ir.Graph([], [out], nodes=b.nodes, initializers=[packed], opset_imports={"": OPSET}, name="g")
    assert not unpack_fp4(ir.Model(graph, ir_version=10))
