"""The copies of the graph that runtimes take, made from the portable one; weights stay references."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes import common

from v4export.graphs.passes.cpu_kernels import KERNELS, cpu_kernels, takes_experts
from v4export.graphs.passes.expand_prefill import expand_prefill
from v4export.graphs.passes.group_experts import group_experts
from v4export.graphs.passes.head_linear import head_linear
from v4export.graphs.passes.nbits_experts import nbits_experts
from v4export.graphs.passes.nbits_linear import nbits_linear
from v4export.graphs.passes.plugin_kernels import plugin_kernels
from v4export.graphs.passes.pointwise import fuse_pointwise, fuse_rounding
from v4export.graphs.passes.rotate_rows import rotate_rows
from v4export.graphs.passes.unpack_fp4 import unpack_fp4
from v4export.graphs.passes.wide_multipliers import Write, wide_multipliers
from v4export.graphs.passes.widen import NARROW, widen
from v4export.graphs.repacked import Repacking
from v4export.graphs.types import infer_types
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE
from v4export.plugins.int4_dequantize.onnx import OP_TYPE as INT4_DEQUANTIZE
from v4export.plugins.kernels.nodes import NAMESPACE

#: Operators of which a body can stand in a graph once only, unless it is put in place.
_NAMED = (INT4_DEQUANTIZE, "QuantizeLinear", "DequantizeLinear")
_PACKED = (ir.DataType.FLOAT4E2M1, ir.DataType.INT4)
#: Letters of sizes that are not the same wherever they stand.
_COUNTS = ("K", "N")


def lower_for_cpu(path: Path, repacking: Repacking | None = None, base: Path | None = None) -> ir.Model:
    """The fast copy: each expert over its tokens, and attention that expands keys and values for a prompt's chunk.

    With ``repacking``, products with integer matrices become onnxruntime's own, for which it collects their weights.
    ``base`` is the folder that weights lie in, where that is not the graph's own.
    """
    model = ir.load(path)
    if base:
        ir.external_data.set_base_dir(model.graph, base)
    if repacking:
        nbits_linear(model, repacking)
        nbits_experts(model, repacking)
    group_experts(model)
    expand_prefill(model)
    packed = any(v.dtype in _PACKED for v in model.graph.initializers.values() if v.uses())
    if _narrow(model) or packed:
        # FP8 matrices are hundreds of nodes, whose bodies onnxruntime can inline as well, but not those of packed ones.
        common.InlinePass(lambda function: packed or function.name != BLOCK_DEQUANTIZE)(model)
    unpack_fp4(model)
    return _carried_in_float32(model)


def lower_for_kernels(path: Path) -> ir.Model:
    """The portable graph for onnxruntime with this project's kernels on a CPU, which read weights as stored."""
    model = ir.load(path)
    group_experts(model, lambda node: not takes_experts(node))
    expand_prefill(model)
    cpu_kernels(model)
    head_linear(model)
    fuse_pointwise(model)
    rotate_rows(model)
    common.InlinePass()(model)
    unpack_fp4(model)
    wide = _carried_in_float32(model, KERNELS)
    fuse_rounding(wide)
    return wide


def bodies_for_cpu(graph: Path | onnx.ModelProto) -> ir.Model:
    """The portable graph, or a piece of it, as it is, its ops' bodies in their places: slow, and what every other
    runtime computes.
    """
    return _carried_in_float32(with_bodies(graph))


def with_bodies(graph: Path | onnx.ModelProto) -> ir.Model:
    """The portable graph for another provider of onnxruntime: bodies in their places, packed FP4 as bytes.

    onnxruntime looks for the types of initialisers before it inlines, and FP8 ones are read inside bodies only.
    """
    # ONNX's own inliner keeps names apart where a body calls another one.
    proto = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    model = ir.from_proto(onnx.inliner.inline_local_functions(proto))
    unpack_fp4(model)
    return model


def lower_for_engine(
    path: Path, wanted: Callable[[str], bool], budget: int, write: Write
) -> tuple[ir.Model | None, dict[str, str]]:
    """The portable graph for TensorRT: kernels in place of the custom nodes that are wanted, bodies in place of those
    that it cannot inline itself, and multipliers of types that it reads; None where nothing changes.

    Arguments as for ``plugin_kernels`` and ``wide_multipliers``; so are types of nodes that keep their body all the
    same, with the reason.
    """
    model = ir.load(path)
    rewritten = wide_multipliers(model, write)
    kept = plugin_kernels(model, wanted, budget)
    inlined = common.InlinePass(_not_inlined_by_tensorrt)(model).modified
    _named_apart(model)
    launched = any(node.domain == NAMESPACE for node in model.graph)
    return model if inlined or launched or rewritten else None, kept


def _not_inlined_by_tensorrt(function: ir.Function) -> bool:
    """Whether TensorRT-RTX 1.7 fails at, or mistakes, a function.

    It gives each layer that quantises, or widens INT4, the name of its node, of which it takes one; and tells functions
    by name alone.
    """
    return bool(function.overload) or any(node.op_type in _NAMED for node in function)


def _named_apart(model: ir.Model) -> None:
    """Names that no function has: TensorRT gives a Constant behind a call the value of its namesake inside."""
    local = {output.name for function in model.functions.values() for node in function for output in node.outputs}
    for node in model.graph:
        for output in node.outputs:
            if output.name in local and not output.is_graph_output():
                output.name = f"inlined.{output.name}"


def _narrow(model: ir.Model) -> bool:
    """Whether it computes in 16 bits; its inputs need not have any, where cached rows are E4M3."""
    return any(output.dtype in NARROW for node in model.graph for output in node.outputs)


def _forget_counts(model: ir.Model) -> None:
    """Take their letters from the numbers of rows and blocks that indexers select, which differ from layer to layer.

    onnxruntime takes sizes of one name for equal, and hands one layer's memory on to another's result.
    """
    for node in model.graph:
        for output in node.outputs:
            dims = output.shape.dims if output.shape is not None else ()
            if any(isinstance(dim, ir.SymbolicDim) and dim.value in _COUNTS for dim in dims):
                output.shape = ir.Shape([None if getattr(dim, "value", None) in _COUNTS else dim for dim in dims])


def _carried_in_float32(model: ir.Model, kernels: Collection[str] = ()) -> ir.Model:
    """Where the graph computes in 16 bits: arithmetic in float32, rounded as the graph rounds. Bodies are inlined."""
    common.RemoveUnusedNodesPass()(model)
    _forget_counts(model)
    if _narrow(model):
        infer_types(model)
        widen(model, kernels)
    return model
