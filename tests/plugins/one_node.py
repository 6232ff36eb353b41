"""Models of a single custom node: built from arrays, checked, and run by onnxruntime through the portable body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from v4export.graphs.stamp import IR_VERSION, portable_bodies
from v4export.plugins import BY_NODE
from v4export.plugins.function_body import OPSET, PLUGIN_HINTS, VERSION, Body

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def one_node(
    op_type: str,
    inputs: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] = (),
    *,
    domain: str = "v4",
    outputs: int = 1,
    width: int | None = None,
    **attributes: Any,
) -> ir.Model:
    """A graph of one custom node. 16-bit inputs and outputs are cast from and to float32 at the graph's edge.

    Args:
        op_type: of the node.
        inputs: give the dtypes and ranks of the node's first inputs, which become the graph's.
        weights: the node's other inputs, stored in the graph.
        domain: of the node.
        outputs: how many the node has.
        width: last dimension of its results, where something needs to know it.
        attributes: the node's own.
    """
    edge, formals, operands = Body("edge."), [], []
    for i, array in enumerate(inputs):
        dtype = ir.tensor(array).dtype
        wide = ir.DataType.FLOAT if dtype in NARROW else dtype
        symbols = 2 if i and array.ndim == 3 else 1
        shape = [f"d{i}_{axis}" if axis < symbols else size for axis, size in enumerate(array.shape)]
        formals.append(ir.Value(name=f"in{i}", shape=ir.Shape(shape), type=ir.TensorType(wide)))
        operand = formals[-1] if wide == dtype else edge.cast(formals[-1], dtype)
        operand.dtype, operand.shape = dtype, ir.Shape(shape)
        operands.append(operand)
    stored = []
    for i, array in enumerate(weights):
        tensor = ir.tensor(array, name=f"w{i}")
        stored.append(ir.Value(name=f"w{i}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    hints = PLUGIN_HINTS if domain == "v4" else {}
    node = ir.Node(
        domain,
        op_type,
        [*operands, *stored],
        ir.convenience.convert_attributes({**attributes, **hints}),
        num_outputs=outputs,
        name=f"the.{op_type}",
    )
    tail = Body("tail.")
    results = []
    for i, (value, dtype_of) in enumerate(zip(node.outputs, BY_NODE[domain, op_type].outputs, strict=True)):
        dtype = dtype_of(node)
        value.name, value.dtype = f"raw{i}", dtype
        value.shape = ir.Shape([f"r{i}_{axis}" for axis in range((inputs or weights)[0].ndim - 1)] + [width or f"r{i}"])
        result = tail.cast(value, ir.DataType.FLOAT) if dtype in NARROW else value
        result.name, result.dtype = f"out{i}", ir.DataType.FLOAT if dtype in NARROW else dtype
        result.shape = value.shape
        results.append(result)
    graph = ir.Graph(
        formals,
        results,
        nodes=[*edge.nodes, node, *tail.nodes],
        initializers=stored,
        opset_imports={"": OPSET, "v4": VERSION, "trt": VERSION},
        name="one",
    )
    return ir.Model(graph, ir_version=IR_VERSION, functions=portable_bodies([node]))


def run(model: ir.Model, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The graph's outputs, after onnx's own checker has passed the model."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {
        value.name: array.astype(np.float32) if ir.tensor(array).dtype in NARROW else array
        for value, array in zip(model.graph.inputs, inputs, strict=True)
    }
    return session.run(None, feeds)


def body_of(model: ir.Model, op_type: str) -> ir.Function:
    return next(f for f in model.functions.values() if f.name == op_type)


def count(model: ir.Model, op_type: str, keep: Callable[[ir.Node], bool] = lambda _: True) -> int:
    """Nodes of an op's body, those of its subgraphs included."""
    return sum(1 for node in ir.traversal.RecursiveGraphIterator(body_of(model, op_type)) if keep(node))


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same values as a tensor; NumPy's bfloat16 and FP8 are unknown to torch."""
    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if array.dtype.name in names:
        bits = np.uint8 if array.itemsize == 1 else np.uint16
        return torch.from_numpy(np.ascontiguousarray(array).view(bits).copy()).view(names[array.dtype.name])
    return torch.from_numpy(np.ascontiguousarray(array))
