"""Chains of pointwise nodes as single ones that kernels for a CPU take (``plugins/cpu/pointwise.hpp``).

A token's step runs hundreds of nodes that do next to nothing, and each takes microseconds all the same.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from v4export.graphs.passes.cpu_kernels import NORM, ROUND, SUM, SWIGLU, rounding
from v4export.graphs.passes.neighbours import made_by, read_by
from v4export.graphs.passes.replaced import replace_by_one
from v4export.graphs.passes.widen import NARROW


def fuse_pointwise(model: ir.Model) -> bool:
    """Rewrite what there is in a graph whose types are those of the portable one; whether there was any.

    Sums and norms of 16 bits, with the rounding of their result; SwiGLU and norms without a weight of any type.
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
        if back is not None and wide and rounding(node.outputs[0]):
            replace_by_one(model.graph, ROUND, [node, back], [node.inputs[0]], activations=rounding(node.outputs[0]))
            found = True
    return found


def _norm(graph: ir.Graph, node: ir.Node) -> bool:
    x = node.inputs[0]
    last = x is not None and x.shape is not None and node.attributes.get_int("axis", -1) in (-1, len(x.shape) - 1)
    if not last or node.outputs[0].dtype not in NARROW:
        return False
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    replace_by_one(graph, NORM, [node], node.inputs[:2], epsilon=epsilon, activations=rounding(node.outputs[0]))
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
    replace_by_one(graph, SUM, [node], node.inputs, activations=rounding(node.outputs[0]))
    return True


def _norm_alone(graph: ir.Graph, square: ir.Node) -> bool:
    """x / sqrt(mean(x^2) + epsilon), which has no weight, of any type."""
    x, power = square.inputs
    mean = read_by(square, "ReduceMean")
    shifted = read_by(mean, "Add")
    root = read_by(shifted, "Sqrt")
    factor = read_by(root, "Reciprocal")
    product = read_by(factor, "Mul")
    chain = [node for node in (square, mean, shifted, root, factor, product) if node is not None]
    if len(chain) < 6 or x not in chain[-1].inputs or x.dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
        return False
    epsilon = _number(chain[2].inputs[1])
    of_columns = _number(chain[1].inputs[1]) == -1 and chain[1].attributes.get_int("keepdims", 1) == 1
    if _number(power) != 2 or not of_columns or math.isnan(epsilon):
        return False
    _finish(graph, NORM, chain, [x], epsilon=epsilon)
    return True


def _swiglu(graph: ir.Graph, sigmoid: ir.Node) -> bool:
    gate, silu = sigmoid.inputs[0], read_by(sigmoid, "Mul")
    product = read_by(silu, "Mul")
    if silu is None or product is None or gate not in silu.inputs or gate.dtype != ir.DataType.FLOAT:  # type: ignore[union-attr]
        return False
    up = next((value for value in product.inputs if value is not silu.outputs[0]), None)
    if up is None or up.shape is None or up.shape != gate.shape:  # type: ignore[union-attr]
        return False
    clips = [made_by(gate, "Clip"), made_by(up, "Clip")]
    limit = _limit(*clips)
    cut = [clip for clip in clips if clip is not None and limit]
    if cut:
        gate, up = (clip.inputs[0] for clip in cut)
    _finish(graph, SWIGLU, [*cut, sigmoid, silu, product], [gate, up], limit=limit)
    return True


def _limit(gate: ir.Node | None, up: ir.Node | None) -> float:
    """What a gate is cut off above, and the other factor on both sides; 0 if they are not."""
    if gate is None or up is None or len(gate.outputs[0].uses()) != 2 or len(up.outputs[0].uses()) != 1:
        return 0.0
    (low, high), (below, above) = (_bounds(clip) for clip in (gate, up))
    return high if low == -math.inf and below == -high < 0 and above == high else 0.0


def _bounds(clip: ir.Node) -> tuple[float, float]:
    """Of a Clip; not numbers where they are computed."""
    low, high = [*clip.inputs[1:], None, None][:2]
    return (-math.inf if low is None else _number(low), math.inf if high is None else _number(high))


def _finish(
    graph: ir.Graph, op_type: str, old: list[ir.Node], inputs: list[ir.Value | None], **attributes: float
) -> None:
    """A node in place of some, and of the rounding of their result where that comes next."""
    narrow = read_by(old[-1], "Cast")
    if narrow is not None and rounding(narrow.outputs[0]):
        old = [*old, narrow]
    replace_by_one(graph, op_type, old, inputs, **attributes, activations=rounding(old[-1].outputs[0]))


_FUSED = {"RMSNormalization": _norm, "Pow": _norm_alone, "Add": _sum, "Sigmoid": _swiglu}


def _number(value: ir.Value | None) -> float:
    """A constant of one number, and not a number where it is none."""
    found = ir.convenience.get_const_tensor(value) if value is not None else None
    return math.nan if found is None or found.size != 1 else float(found.numpy().item())


def _known(dim: int | ir.SymbolicDim) -> int | None:
    return dim if isinstance(dim, int) else None
