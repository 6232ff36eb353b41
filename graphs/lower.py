"""The copies of the graph that runtimes take, made from the portable one; weights stay references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes import common

from v4export.graphs.passes.expand_prefill import expand_prefill
from v4export.graphs.passes.group_experts import group_experts
from v4export.graphs.passes.plugin_kernels import plugin_kernels
from v4export.graphs.passes.unpack_fp4 import unpack_fp4
from v4export.graphs.passes.widen import NARROW, widen
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE


def lower_for_cpu(path: Path) -> ir.Model:
    """The fast copy: each expert over its tokens, and attention that expands keys and values for a prompt's chunk."""
    model = ir.load(path)
    group_experts(model)
    expand_prefill(model)
    if _narrow(model):
        # FP8 matrices are hundreds of nodes, whose bodies onnxruntime can inline as well.
        common.InlinePass(lambda function: function.name != BLOCK_DEQUANTIZE)(model)
    unpack_fp4(model)
    return _carried_in_float32(model)


def bodies_for_cpu(path: Path) -> ir.Model:
    """The portable graph as it is, its ops' bodies in their places: slow, and what every other runtime computes."""
    return _carried_in_float32(with_bodies(path))


def with_bodies(path: Path) -> ir.Model:
    """The portable graph for another provider of onnxruntime: bodies in their places, packed FP4 as bytes.

    onnxruntime looks for the types of initialisers before it inlines, and FP8 ones are read inside bodies only.
    """
    # ONNX's own inliner keeps names apart where a body calls another one.
    proto = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    model = ir.from_proto(proto)
    unpack_fp4(model)
    return model


def lower_for_plugins(path: Path, wanted: Callable[[str], bool], budget: int) -> tuple[ir.Model, dict[str, str]]:
    """The portable graph with kernels in place of the custom nodes that are wanted, for TensorRT; and types of nodes
    that keep their body all the same, with the reason. Arguments as for ``plugin_kernels``.
    """
    model = ir.load(path)
    return model, plugin_kernels(model, wanted, budget)


def _narrow(model: ir.Model) -> bool:
    return any(v.dtype in NARROW for v in model.graph.inputs)


def _carried_in_float32(model: ir.Model) -> ir.Model:
    """Where the graph computes in 16 bits: arithmetic in float32, rounded as the graph rounds. Bodies are inlined."""
    if _narrow(model):
        common.ShapeInferencePass()(model)
        widen(model)
    common.RemoveUnusedNodesPass()(model)
    return model
