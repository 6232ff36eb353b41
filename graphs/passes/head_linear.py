"""Products of every head with rows of its own of one stored matrix, as nodes that kernels for a CPU take.

Latent attention takes keys and values out of one matrix [H * (N + V), L], and DeepSeek-V4 projects groups of heads by
one [G * F, K]: views of stored bytes, which onnxruntime would widen when a session is made, and copy. A node reads the
rows of each head where they lie, and takes tokens first, so that no transposition is left. Of float32 graphs only
branches are rewritten, which ``expand_prefill`` makes for few tokens: many are multiplied faster by onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from v4export.graphs.passes.cpu_kernels import HEAD_LINEAR, rounding
from v4export.graphs.passes.neighbours import made_by, read_by
from v4export.graphs.passes.replaced import replace
from v4export.graphs.passes.stored_matrix import StoredMatrix, stored_matrix
from v4export.graphs.passes.widen import NARROW
from v4export.plugins.function_body import DOMAIN, Body

_SWAPPED = (1, 0, 2)


@dataclass(frozen=True)
class _Rows:
    """A head's rows ``first .. first + count - 1`` of every ``each``: what it multiplies by or, transposed, sums up."""

    matrix: StoredMatrix
    each: int
    first: int
    count: int
    transposed: bool


def head_linear(model: ir.Model) -> bool:
    """Rewrite every such product in place; whether there was any."""
    found = False
    for node in [each for each in model.graph.all_nodes() if each.op_type == "MatMul"]:
        before, after = made_by(node.inputs[0], "Transpose"), read_by(node, "Transpose")
        rows = _rows(node.inputs[1])
        if not (before and after and rows and _swaps(before) and _swaps(after)):
            continue
        graph, x = node.graph, before.inputs[0]
        assert isinstance(graph, ir.Graph) and x is not None
        if x.dtype not in NARROW and graph is model.graph:
            continue
        body = Body(f"{node.name or node.outputs[0].name}.")
        y = body.op(
            HEAD_LINEAR, x, *rows.matrix.read_by(model.graph), domain=DOMAIN,
            **rows.matrix.attributes, each=rows.each, first=rows.first, count=rows.count,
            transposed=int(rows.transposed), activations=rounding(x),
        )  # fmt: skip
        replace(graph, after, [node, after], body.nodes, after.outputs, [y])
        found = True
    return found


def _rows(value: ir.Value | None) -> _Rows | None:
    """What the second factor [H, in, out] of a product is of a stored matrix, by Reshape, Split and Transpose."""
    turn = made_by(value, "Transpose")
    part = turn.inputs[0] if turn and _perm(turn) == (0, 2, 1) else value
    split = made_by(part, "Split")
    view = made_by(split.inputs[0] if split else part, "Reshape")
    matrix = stored_matrix(view.inputs[0]) if view else None
    if part is None or view is None or matrix is None or part.shape is None or view.outputs[0].shape is None:
        return None
    each, count = view.outputs[0].shape[1], part.shape[1]
    if not isinstance(each, int) or not isinstance(count, int) or (split and split.attributes["axis"].as_int() != 1):
        return None
    first = each - count if split and part is split.outputs[-1] else 0
    if split and part not in (split.outputs[0], split.outputs[-1]):
        return None
    return _Rows(matrix, each, first, count, transposed=turn is None)


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes["perm"].as_ints())


def _swaps(node: ir.Node) -> bool:
    return _perm(node) == _SWAPPED
