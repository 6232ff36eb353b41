"""Chains of pointwise nodes as single ones that kernels for a CPU take (``plugins/cpu/pointwise.hpp``).

A token's step runs hundreds of nodes that do next to nothing, and each takes microseconds all the same.
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.graphs.passes.cpu_kernels import NORM, ROUND, SUM, SWIGLU, rounding
from v4export.graphs.passes.neighbours import read_by
from v4export.graphs.passes.replaced import replace
from v4export.graphs.passes.widen import NARROW
from v4export.plugins.function_body import DOMAIN, Body


def fuse_pointwise(model: ir.Model) -> bool:
    """Rewrite what there is in a graph whose types are those of the portable one; whether there was any.

    Sums and norms of 16 bits, with the rounding of their result; SwiGLU of any type.
    """
    found = False
    for node in list(model.graph):
        if node.op_type in _FUSED and node.graph is model.graph:
            found = _FUSED[node.op_type](model.graph, node) or found
    return found


def fuse_rounding(model: ir.Model) -> bool:
    """Rewrite float32 that is cast to 16 bits, and back at once; whether there was any."""
    found = False
    for node in list(model.graph):
        back = read_by(node, "Cast") if node.op_type == "Cast" else None
        wide = back is not None and node.inputs[0].dtype == back.outputs[0].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
        if back is not None and wide and rounding(node):
            _put(model.graph, ROUND, [node, back], [node.inputs[0]], activations=rounding(node))
            found = True
    return found


def _norm(graph: ir.Graph, node: ir.Node) -> bool:
    x = node.inputs[0]
    last = x is not None and x.shape is not None and node.attributes.get_int("axis", -1) in (-1, len(x.shape) - 1)
    if not last or node.outputs[0].dtype not in NARROW:
        return False
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    _put(graph, NORM, [node], node.inputs[:2], epsilon=epsilon, activations=rounding(node))
    return True


def _sum(graph: ir.Graph, node: ir.Node) -> bool:
    a, b = (value.shape if value is not None and value.const_value is None else None for value in node.inputs)
    # A size that nobody knows may be any; one that is known has to be the other's, or one would be repeated.
    same = a is not None and b is not None and len(a) == len(b)
    if (
        not same
        or node.outputs[0].dtype not in NARROW
        or any(_known(m) != _known(n) for m, n in zip(a, b, strict=True))
    ):  # type: ignore[arg-type]
        return False
    _put(graph, SUM, [node], node.inputs, activations=rounding(node))
    return True


def _swiglu(graph: ir.Graph, sigmoid: ir.Node) -> bool:
    gate, silu = sigmoid.inputs[0], read_by(sigmoid, "Mul")
    product = read_by(silu, "Mul")
    if silu is None or product is None or gate not in silu.inputs or gate.dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
        return False
    up = next((value for value in product.inputs if value is not silu.outputs[0]), None)
    if up is None or up.shape is None or up.shape != gate.shape:  # type: ignore[union-attr]
        return False
    old = [sigmoid, silu, product]
    narrow = read_by(product, "Cast")
    if narrow is not None and rounding(narrow):
        old.append(narrow)
    _put(graph, SWIGLU, old, [gate, up], activations=rounding(old[-1]))
    return True


_FUSED = {"RMSNormalization": _norm, "Add": _sum, "Sigmoid": _swiglu}


def _known(dim: int | ir.SymbolicDim) -> int | None:
    return dim if isinstance(dim, int) else None


def _put(graph: ir.Graph, op_type: str, old: list[ir.Node], inputs, **attributes: object) -> None:  # type: ignore[no-untyped-def]
    """A node in place of a chain of them, of which the last one's result is the only one read elsewhere."""
    last = old[-1]
    body = Body(f"{last.name or last.outputs[0].name}.")
    y = body.op(op_type, *inputs, domain=DOMAIN, **attributes)
    replace(graph, last, old, body.nodes, last.outputs, [y])
