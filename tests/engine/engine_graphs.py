"""Small ONNX models for the engine tests, made by hand."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1), helper.make_opsetid("v4", 1)]
NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
ONNX = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_RNG = np.random.default_rng(0)


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, name=f"{op}_{outputs[0]}", **attributes)


def value(name: str, kind: int, shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def ints(name: str, values) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def tensor(name: str, shape: tuple[int, ...], dtype) -> onnx.TensorProto:
    return numpy_helper.from_array(_RNG.standard_normal(shape).astype(dtype), name)


def model(nodes, inputs, outputs, initialisers, functions=()) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "test", inputs, outputs, initialisers)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=11, functions=list(functions))


def save(proto: onnx.ModelProto, folder: Path, external: bool = False) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def linear(precision: str, rows: int = 256, columns: int = 200) -> onnx.ModelProto:
    """y [B,S,200] = x [B,S,256] W, everything in one type."""
    kind = ONNX[precision]
    weights = tensor("W", (rows, columns), NUMPY[precision])
    return model(
        [node("MatMul", ["x", "W"], ["y"])],
        [value("x", kind, ["B", "S", rows])],
        [value("y", kind, ["B", "S", columns])],
        [weights],
    )


def dequantize_function() -> onnx.FunctionProto:
    """The portable body of TRT_BlockDequantize; TensorRT uses its own operator of that name."""
    return helper.make_function(
        "trt",
        "TRT_BlockDequantize",
        ["w", "s"],
        ["y"],
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.BFLOAT16)],
        OPSETS,
        attributes=["block_shape", "output_dtype"],
    )


def dequantize(weights: str, scale: str, out: str, block: list[int]) -> onnx.NodeProto:
    attributes = {"block_shape": block, "output_dtype": TensorProto.BFLOAT16}
    return node("TRT_BlockDequantize", [weights, scale], [out], domain="trt", **attributes)


def fp8_linear(rows: int = 1200, columns: int = 1088, transpose: bool = True) -> onnx.ModelProto:
    """y = x W^T with W in fp8 blocks of 128 x 128, the last ones ragged, dequantised to bf16."""
    weights = tensor("W", (rows, columns), ml_dtypes.float8_e4m3fn)
    scale = numpy_helper.from_array(_RNG.random((-(-rows // 128), -(-columns // 128)), dtype=np.float32) + 0.5, "scale")
    nodes = [dequantize("W", "scale", "wide", [128, 128])]
    nodes += [node("Transpose", ["wide"], ["turned"], perm=[1, 0])] if transpose else []
    used, wide, narrow = ("turned", columns, rows) if transpose else ("wide", rows, columns)
    return model(
        [*nodes, node("MatMul", ["x", used], ["y"])],
        [value("x", TensorProto.BFLOAT16, ["B", "S", wide])],
        [value("y", TensorProto.BFLOAT16, ["B", "S", narrow])],
        [weights, scale],
        [dequantize_function()],
    )


def fp4_linear(rows: int = 256, columns: int = 512) -> onnx.ModelProto:
    """y = x W^T with W in packed E2M1 and a power of two for 32 columns of a row, dequantised to bf16."""
    packed = tensor("W", (rows, columns), ml_dtypes.float4_e2m1fn)
    powers = np.exp2(_RNG.integers(-4, 2, (rows, columns // 32))).astype(ml_dtypes.bfloat16)
    nodes = [dequantize("W", "scale", "wide", [1, 32]), node("Transpose", ["wide"], ["turned"], perm=[1, 0])]
    return model(
        [*nodes, node("MatMul", ["x", "turned"], ["y"])],
        [value("x", TensorProto.BFLOAT16, ["B", "S", columns])],
        [value("y", TensorProto.BFLOAT16, ["B", "S", rows])],
        [packed, numpy_helper.from_array(powers, "scale")],
        [dequantize_function()],
    )


def cached_model(layers: int = 2, hidden: int = 64, vocabulary: int = 96) -> onnx.ModelProto:
    """The state contract in small: embedding, layers that attend to cached and new rows, logits at chosen positions."""
    kind = TensorProto.BFLOAT16
    inputs = [
        value("input_ids", TensorProto.INT64, ["B", "S"]),
        value("position", TensorProto.INT64, ["B"]),
        value("logits_at", TensorProto.INT64, ["B", "Q"]),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["B", "Q", vocabulary])]
    weights = [
        tensor("embedding", (vocabulary, hidden), ml_dtypes.bfloat16),
        tensor("head", (hidden, vocabulary), ml_dtypes.bfloat16),
        ints("axes", [1, 2]),
        ints("last", [2]),
    ]
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["tokens"], axis=0),
        node("Cast", ["position"], ["position_bf16"], to=kind),
        node("Unsqueeze", ["position_bf16", "axes"], ["position_BSD"]),
        node("Add", ["tokens", "position_BSD"], ["h0"]),
    ]
    for i in range(layers):
        old, new, weight = f"state.{i}.latent", f"new_state.{i}.latent", f"W{i}"
        inputs.append(value(old, kind, ["B", "T", hidden]))
        outputs.append(value(new, kind, ["B", "S", hidden]))
        weights.append(tensor(weight, (hidden, hidden), ml_dtypes.bfloat16))
        nodes += [
            node("MatMul", [f"h{i}", weight], [new]),
            node("Concat", [old, new], [f"rows{i}"], axis=1),
            node("Transpose", [f"rows{i}"], [f"columns{i}"], perm=[0, 2, 1]),
            node("MatMul", [f"h{i}", f"columns{i}"], [f"scores{i}"]),
            node("Softmax", [f"scores{i}"], [f"shares{i}"], axis=-1),
            node("MatMul", [f"shares{i}", f"rows{i}"], [f"h{i + 1}"]),
        ]
    nodes += [
        node("Unsqueeze", ["logits_at", "last"], ["at"]),
        node("GatherND", [f"h{layers}", "at"], ["wanted"], batch_dims=1),
        node("MatMul", ["wanted", "head"], ["logits_bf16"]),
        node("Cast", ["logits_bf16"], ["logits"], to=TensorProto.FLOAT),
    ]
    return model(nodes, inputs, outputs, weights)


def experts_loop(count: int = 4, width: int = 64) -> onnx.ModelProto:
    """A Loop over experts, holding an If that skips those nobody chose, after an If beside it."""
    chosen = helper.make_graph(
        [
            node("Gather", ["W", "e"], ["We"], axis=0),
            node("MatMul", ["x", "We"], ["share"]),
            node("Add", ["sum", "share"], ["more"]),
        ],
        "chosen",
        [],
        [value("more", TensorProto.FLOAT16, ["S", width])],
    )
    skipped = helper.make_graph(
        [node("Identity", ["sum"], ["same"])], "skipped", [], [value("same", TensorProto.FLOAT16, ["S", width])]
    )
    body = helper.make_graph(
        [
            node("Equal", ["chosen_experts", "e"], ["equal"]),
            node("Cast", ["equal"], ["equal_int"], to=TensorProto.INT32),
            node("ReduceMax", ["equal_int"], ["any_int"], keepdims=0),
            node("Cast", ["any_int"], ["any"], to=TensorProto.BOOL),
            node("If", ["any"], ["sum_out"], then_branch=chosen, else_branch=skipped),
            node("Identity", ["go"], ["go_out"]),
        ],
        "body",
        [value("e", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT16, None)],
        [value("go_out", TensorProto.BOOL, []), value("sum_out", TensorProto.FLOAT16, None)],
    )
    few = helper.make_graph(
        [node("Gather", ["W", "zero"], ["W0"], axis=0), node("MatMul", ["x", "W0"], ["first"])],
        "few",
        [],
        [value("first", TensorProto.FLOAT16, ["S", width])],
    )
    many = helper.make_graph(
        [node("Sub", ["x", "x"], ["nothing"])], "many", [], [value("nothing", TensorProto.FLOAT16, ["S", width])]
    )
    return model(
        [
            node("Shape", ["x"], ["shape"]),
            node("Gather", ["shape", "zero"], ["tokens"], axis=0),
            node("LessOrEqual", ["tokens", "limit"], ["small"]),
            node("If", ["small"], ["start"], then_branch=few, else_branch=many),
            node("Where", ["small", "zero", "count"], ["trips"]),
            node("Loop", ["trips", "yes", "start"], ["y"], body=body),
        ],
        [value("x", TensorProto.FLOAT16, ["S", width]), value("chosen_experts", TensorProto.INT64, ["S", 2])],
        [value("y", TensorProto.FLOAT16, ["S", width])],
        [
            tensor("W", (count, width, width), np.float16),
            ints("zero", 0),
            ints("limit", 16),
            ints("count", count),
            numpy_helper.from_array(np.array(True), "yes"),
        ],
    )
