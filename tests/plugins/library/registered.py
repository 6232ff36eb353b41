"""Parses and builds a node that carries its kernel with TensorRT-RTX: registered.py LIBRARY dlopen|load_library.

Prints whether it was, and what is in the engine. In a process of its own, since a plugin at fault ends it.
"""

from __future__ import annotations

import ctypes
import sys

import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper

PTX = "// the kernel's code, which nothing reads before an engine runs"
LAUNCH = """entry moe_route
threads 128
shared 0
scalar i0.0
grid i0.0 4 cdiv
grid 1
grid 1
output float32: i0.0, 4
output int64: i0.0, 4"""


def model() -> onnx.ModelProto:
    def value(name: str, dtype: int, dims: list | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, dims)

    hints = {"plugin_namespace": "v4_kernels", "plugin_version": "1"}
    nodes = [
        helper.make_node("Neg", ["logits"], ["negated"]),
        helper.make_node(
            "MoeRoute",
            ["negated", "bias"],
            ["weights", "indices"],
            domain="v4_kernels",
            ptx=PTX,
            launch=LAUNCH,
            **hints,
        ),
    ]
    inputs = [value("logits", TensorProto.FLOAT, ["m", 16]), value("bias", TensorProto.FLOAT, [16])]
    outputs = [value("weights", TensorProto.FLOAT, ["m", 4]), value("indices", TensorProto.INT64, ["m", 4])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("v4_kernels", 1)]
    graph = helper.make_graph(nodes, "route", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def main(library: str, how: str) -> None:
    if how == "dlopen":
        ctypes.CDLL(library)
    else:
        print("loaded", trt.get_plugin_registry().load_library(library) is not None)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    print("parsed", parser.parse(model().SerializeToString()), flush=True)
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    print([(tuple(output.shape), output.dtype.name) for output in outputs])
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("logits", (1, 16), (4, 16), (16, 16))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = bytes(builder.build_serialized_network(network, config))
    print("carried", PTX.encode() in engine, LAUNCH.encode() in engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
