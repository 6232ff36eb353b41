"""Ops by this project's kernels for onnxruntime on a CPU: a graph of one node, which cannot run without them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from v4export.graphs.passes.cpu_kernels import KERNELS, cpu_kernels
from v4export.graphs.stamp import IR_VERSION
from v4export.plugins import OPS
from v4export.plugins.cpu import Target, library
from v4export.plugins.function_body import OPSET, VERSION, first_dtype

#: Of PyTorch's types that NumPy has not, what holds their bits and what they are.
_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e8m0fnu: (torch.uint8, np.uint8),
}
_NARROW = (torch.float16, torch.bfloat16)
#: Of how many first arguments a graph computes each, and so carries them in float32, where that is not one.
_CARRIED = {"HyperMix": 2}
#: Attributes that are sizes of arguments.
_COUNTS = {"num_experts": lambda args: len(args[3]), "num_streams": lambda args: args[0].shape[1]}


def has_kernel(op: torch.library.CustomOpDef) -> bool:
    """Whether there is one, in every form that the op has."""
    return _of(op).op_type in KERNELS


@functools.cache
def _of(op: torch.library.CustomOpDef) -> Any:
    return next(one for one in OPS if one.torch_op is op)


def run(
    op: torch.library.CustomOpDef, args: Sequence[Any], target: Target | None = None, without: str = ""
) -> list[torch.Tensor]:
    """The op's outputs, by a node ``without`` an attribute; what graphs carry in float32 is widened."""
    x, carried = args[0], _CARRIED.get(_of(op).op_type, 1)
    model = _model(_of(op), [*(one.float() for one in args[:carried]), *args[carried:]], x.dtype)
    model.graph[0].attributes.pop(without, None)
    found = _session(model, target).run(None, {"x": x.float().numpy()})
    of_x = [dtype_of is first_dtype for dtype_of in _of(op).outputs]
    return [
        torch.from_numpy(one).to(x.dtype) if same else torch.from_numpy(one)
        for one, same in zip(found, of_x, strict=True)
    ]


def run_node(
    op_type: str, inputs: Sequence[torch.Tensor], attributes: dict[str, str | float | int], target: Target | None = None
) -> torch.Tensor:
    """The only output, float32, of a node that stands for no op; inputs that are not float32 are stored."""
    values = [ir.Value(name=f"x{i}") for i in range(len(inputs))]
    fed = {value: one for value, one in zip(values, inputs, strict=True) if one.dtype == torch.float32}
    for value, one in zip(values, inputs, strict=True):
        tensor = ir.tensor(_array(one), name=value.name)
        value.shape, value.dtype = tensor.shape, tensor.dtype
        value.const_value = None if value in fed else tensor
    node = ir.node(op_type, values, attributes, domain="v4")
    y = node.outputs[0]
    y.name, y.dtype = "y", ir.DataType.FLOAT
    stored = [value for value in values if value not in fed]
    graph = ir.Graph(
        list(fed), [y], nodes=[node], initializers=stored, opset_imports={"": OPSET, "v4": VERSION}, name="one"
    )
    feeds = {value.name: one.numpy() for value, one in fed.items()}
    return torch.from_numpy(_session(ir.Model(graph, ir_version=IR_VERSION), target).run(None, feeds)[0])


def _session(model: ir.Model, target: Target | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    options.register_custom_ops_library(str(library(target)))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _model(custom: Any, args: Sequence[Any], dtype: torch.dtype) -> ir.Model:
    """Every tensor but the first is stored in the graph."""
    x, *stored = _arrays(args)
    shape = ir.Shape([f"d{axis}" for axis in range(x.ndim)])
    inputs = [ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))]
    for i, array in enumerate(stored):
        tensor = ir.tensor(array, name=f"w{i}")
        inputs.append(ir.Value(name=f"w{i}", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
    scalars = [0.0 if a is None else a for a in args if not isinstance(a, torch.Tensor | list)]
    attributes = dict(zip(_in_order(custom, custom.attributes.keys() - _COUNTS), scalars, strict=False))
    attributes |= {name: count(args) for name, count in _COUNTS.items() if name in custom.attributes}
    node = ir.Node(
        "v4", custom.op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=len(custom.outputs)
    )
    for i, (value, dtype_of) in enumerate(zip(node.outputs, custom.outputs, strict=True)):
        value.name, value.dtype = f"out{i}", dtype_of(node)
        value.shape = ir.Shape([f"o{i}_{axis}" for axis in range(x.ndim if value.dtype == ir.DataType.FLOAT else 2)])
    graph = ir.Graph(
        inputs[:1], node.outputs, nodes=[node], initializers=inputs[1:], opset_imports={"": OPSET, "v4": VERSION},
        name="one",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=IR_VERSION)
    assert cpu_kernels(model)
    if dtype in _NARROW:
        node.attributes["activations"] = ir.AttrString("activations", str(dtype).removeprefix("torch."))
    return model


def _in_order(custom: Any, names: Iterable[str]) -> list[str]:
    """Names of attributes in the order of the op's arguments."""
    arguments = [a.name for a in custom.torch_op._opoverload._schema.arguments]
    return sorted(names, key=arguments.index)


def _arrays(args: Sequence[Any]) -> Iterator[np.ndarray]:
    lists = [one for one in args if isinstance(one, list)]
    for one in args:
        if isinstance(one, torch.Tensor):
            yield _array(one)
        elif isinstance(one, list):
            # Matrices as graphs have them, with a leading 1; the first three lists are of matrices, packed or not.
            is_packed = any(one is matrices for matrices in lists[:3])
            for matrix in one:
                yield _unpacked(matrix)[None] if is_packed and matrix.dtype == torch.uint8 else _array(matrix)[None]


def _unpacked(packed: torch.Tensor) -> np.ndarray:
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return codes.numpy().view(ml_dtypes.float4_e2m1fn)


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in _BITS:
        held, dtype = _BITS[tensor.dtype]
        return tensor.contiguous().view(held).numpy().view(dtype)
    return tensor.contiguous().numpy()
