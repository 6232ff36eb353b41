"""Drives TensorRT's own code for ahead-of-time plugins as far as a kernel's launch, and prints what it came to.

``python aot_driver.py MODEL STUBS``: a graph of kernels, and a folder with empty libraries under the names that
TensorRT's bindings ask for. The bindings are real; expressions over dimensions, made by a builder alone, are numbers.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx

from v4export.plugins.kernels import plugin_aot


class Number:
    """Stands for IDimensionExpr."""

    def __init__(self, value: int) -> None:
        self.value = value


class Numbers(list):
    """Stands for DimsExprs."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Builder:
    """Stands for IExprBuilder."""

    def __init__(self, trt: Any) -> None:
        o = trt.DimensionOperation
        self.operations = {
            o.SUM: lambda a, b: a + b,
            o.SUB: lambda a, b: a - b,
            o.PROD: lambda a, b: a * b,
            o.FLOOR_DIV: lambda a, b: a // b,
            o.CEIL_DIV: lambda a, b: -(-a // b),
            o.MIN: min,
            o.MAX: max,
        }

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, name: Any, a: Number, b: Number) -> Number:
        return Number(self.operations[name](a.value, b.value))


class Asked:
    """Stands for what TensorRT has filled in: launch parameters, or scalar arguments."""

    def __init__(self) -> None:
        self.scalars: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.scalars[index] = value


def bindings(stubs: Path) -> tuple[Any, Any, Any]:
    """TensorRT's Python modules, over empty libraries."""
    for library in stubs.glob("*.so.*"):
        ctypes.CDLL(str(library))
    trt = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = trt
    plugin = importlib.import_module("tensorrt_bindings.plugin")
    tensors = importlib.import_module("tensorrt_bindings.plugin._tensor")
    trt.IDimensionExpr, trt.DimsExprs = Number, Numbers
    tensors.SymExprImpl = lambda size: size._expr.value
    lib = importlib.import_module("tensorrt_bindings.plugin._lib")
    lib._register_plugin_creator = lambda *_: None  # there is no registry
    return trt, plugin, lib


def main(model: str, stubs: str) -> None:
    """Every kind of node once, with 3 for each dimension that the graph leaves open."""
    trt, trtp, lib = bindings(Path(stubs))
    graph = onnx.load(model, load_external_data=False).graph
    known = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    shapes = {
        name: ([d.dim_value or 3 for d in v.type.tensor_type.shape.dim], v.type.tensor_type.elem_type)
        for name, v in known.items()
    }
    shapes |= {t.name: (list(t.dims), t.data_type) for t in graph.initializer}
    nodes = {node.op_type: node for node in graph.node if any(a.name == "ptx" for a in node.attribute)}
    plugin_aot.register(trtp, trt, {name: (len(n.input), len(n.output)) for name, n in nodes.items()})
    types = {
        onnx.TensorProto.FLOAT: trt.float32,
        onnx.TensorProto.FLOAT16: trt.float16,
        onnx.TensorProto.BFLOAT16: trt.bfloat16,
        onnx.TensorProto.INT64: trt.int64,
        onnx.TensorProto.INT32: trt.int32,
    }
    for name, node in nodes.items():
        inputs = [shapes[i] for i in node.input]
        attributes = {a.name: a.s.decode() for a in node.attribute if a.name in ("launch", "ptx")}
        definition, builder = lib.QDP_REGISTRY[f"v4_kernels::{name}"], Builder(trt)
        plugin = lib._TemplateAOTPlugin(name, "v4_kernels", definition.num_outputs)
        plugin.init(
            definition.register_func, attributes, definition.aot_impl_attr_names, definition.aot_impl_func,
            definition.autotune_attr_names, definition.autotune_func,
        )  # fmt: skip
        dtypes = plugin.get_output_data_types([types[t] for _, t in inputs], [len(dims) for dims, _ in inputs])
        dims = [[Number(d) for d in shape] for shape, _ in inputs]
        outputs = [[d.value for d in shape] for shape in plugin.get_output_shapes(dims, [], builder)]
        described = [_described(trt, shape, types[t]) for shape, t in inputs]
        described += [_described(trt, shape, t) for shape, t in zip(outputs, dtypes, strict=True)]
        combinations = plugin.get_supported_format_combinations(described, len(inputs))
        plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])
        (tactic,) = plugin.get_valid_tactics()
        plugin.set_tactic(tactic)
        params, scalars = Asked(), Asked()
        plugin.get_launch_params(dims, described, len(inputs), params, scalars, builder)
        kernel, code = plugin.get_kernel(
            [d.desc for d in described[: len(inputs)]], [d.desc for d in described[len(inputs) :]]
        )
        found = {
            key: getattr(params, key) for key in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "shared_mem")
        }
        result = {
            "name": name, "entry": kernel, "code": len(code), "outputs": outputs,
            "dims": [shape for shape, _ in inputs],
            "dtypes": [str(d).rpartition(".")[2] for d in dtypes], "scalars": list(scalars.scalars.values()),
            "combinations": len(combinations), **attributes, **found,
        }  # fmt: skip
        print(json.dumps(result))


def _described(trt: Any, shape: list[int], dtype: Any) -> Any:
    described = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format = trt.Dims(shape), dtype, trt.TensorFormat.LINEAR
    described.desc = desc
    return described


if __name__ == "__main__":
    main(*sys.argv[1:3])
