"""Kernels as nodes of a graph: one launch each, with its code and its launch among the attributes.

A plugin that reads the two needs to know nothing of the kernel, so one class serves all of them in each of TensorRT's
ways, and an engine that keeps them needs no file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from v4export.plugins.function_body import VERSION, Body
from v4export.plugins.kernels import nvrtc
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Constant, Kernel, Typed
from v4export.plugins.limits import MAX_ELEMENTS

#: Domain of the nodes, and namespace of their plugins: not that of the ops, some of which have the names of kernels.
NAMESPACE = "v4_kernels"
#: Attributes of every node: how to launch it, and what.
LAUNCH, CODE = "launch", "ptx"
#: That a plugin compiled ahead of time is preferred, where there is a choice.
_HINTS = {"plugin_namespace": NAMESPACE, "plugin_version": str(VERSION), "aot": 1}
_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
    ir.DataType.FLOAT4E2M1: "float4_e2m1",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class NodeWriter:
    """Writes kernels where ``Caller`` would launch them.

    Args:
        name: of the node that is replaced; what is written for it is called after it.
        flat: a stored matrix as one row [1, numbers], of a type that TensorRT lets plugins have.
        budget: shared memory of a launch, in bytes.
    """

    def __init__(self, name: str, flat: Callable[[ir.Value], ir.Value], budget: int = PLAIN_SHARED) -> None:
        self.body, self._flat, self._budget = Body(f"{name}."), flat, budget

    def __call__(self, kernel: Kernel, *values: ir.Value, **constants: Constant) -> tuple[ir.Value, ...]:
        """The node of a kernel; its outputs have the types and the dimensions of the launch."""
        compiled = kernel.compilable([_typed(value) for value in values], constants, self._budget)
        launch = compiled.launch
        outputs = self.body.ops(
            kernel.name, *values, outputs=len(launch.outputs), domain=NAMESPACE,
            **{LAUNCH: launch.text(), CODE: nvrtc.ptx(compiled)}, **_HINTS,
        )  # fmt: skip
        for value, (dtype, dims) in zip(outputs, launch.outputs, strict=True):
            value.type = ir.TensorType(_DTYPES[dtype])
            value.shape = ir.Shape([d.value if isinstance(d.value, int) else None for d in dims])
        return tuple(outputs)

    def dtype_of(self, value: ir.Value) -> str:
        """A value's type as kernels call it."""
        assert value.dtype is not None
        return _NAMES[value.dtype]

    def reshape(self, value: ir.Value, *dims: int) -> ir.Value:
        """The same numbers in another shape."""
        out = self.body.reshape(value, *dims)
        out.type, out.shape = value.type, ir.Shape([None if d < 0 else d for d in dims])
        return out

    def tables(self, *lists: Sequence[ir.Value]) -> tuple[list[ir.Value], dict[str, int]]:
        """Operands by which a kernel finds the matrices of each list that has any: stacks of them, in as few parts as
        TensorRT takes, and the constants that say so to the kernel.
        """
        stored = [[self._flat(value) for value in matrices] for matrices in lists if matrices]
        count, largest = len(lists[0]), max(math.prod(_dims(matrices[0])) for matrices in stored)
        each = min(count, MAX_ELEMENTS // largest)
        starts = range(0, count, each)
        stacks = [self._stack(matrices[first : first + each]) for matrices in stored for first in starts]
        return stacks, {"PARTS": len(starts), "PART": each}

    def _stack(self, matrices: Sequence[ir.Value]) -> ir.Value:
        stack = self.body.op("Concat", *matrices, axis=0)
        stack.type, stack.shape = matrices[0].type, ir.Shape([len(matrices), *_dims(matrices[0])[1:]])
        return stack


def kernel_nodes(path: Path) -> list[onnx.NodeProto]:
    """The nodes of a graph on disk that launch kernels."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [node for node in nodes if node.domain == NAMESPACE]


def _dims(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(d) for d in value.shape]  # type: ignore[arg-type]


def _typed(value: ir.Value) -> Typed:
    if value.dtype is None or value.shape is None:
        raise ValueError(f"{value.name}: a kernel's operands must have known types and ranks")
    return Typed(_NAMES[value.dtype], tuple(d if isinstance(d, int) else None for d in value.shape))
