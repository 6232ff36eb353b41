"""Rotary embedding of some of rows' columns as one node that a kernel for a CPU takes (``plugins/cpu/rotate.hpp``).

ONNX's operator wants heads in one row, float32 and nothing beside what it turns, for which rows are cut up, reshaped,
cast and put together again.
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.graphs.passes.cpu_kernels import ROTATE, rounding
from v4export.graphs.passes.neighbours import made_by, read_by
from v4export.graphs.passes.replaced import replace_by_one


def rotate_rows(model: ir.Model) -> bool:
    """Rewrite what there is in a graph whose types are those of the portable one; whether there was any."""
    found = [_rotate(model.graph, node) for node in list(model.graph) if node.op_type == "RotaryEmbedding"]
    return any(found)


def _rotate(graph: ir.Graph, turned: ir.Node) -> bool:
    x, *angles = turned.inputs
    wide = made_by(x, "Cast")
    flat = made_by(wide.inputs[0] if wide else x, "Reshape")
    back = read_by(turned, "Reshape")
    last = read_by(back, "Cast") if wide else back
    if flat is None or last is None or len(angles) != 2:
        return False
    rows, result = flat.inputs[0], last.outputs[0]
    if not _heads_of(rows, turned) == _heads_of(result, turned) is not None:
        return False
    old = [node for node in (flat, wide, turned, back, last if wide else None) if node]
    begin, cut, joined = 0, made_by(rows, "Split"), read_by(last, "Concat")
    if cut is not None and joined is not None and _is_put_back(rows, cut, result, joined):
        begin = int(cut.outputs[0].shape[-1]) if rows is not cut.outputs[0] else 0  # type: ignore[index, arg-type]
        old, rows = [cut, *old, joined], cut.inputs[0]
    interleaved = turned.attributes.get_int("interleaved", 0)
    replace_by_one(
        graph, ROTATE, old, [rows, *angles], begin=begin, interleaved=interleaved, activations=rounding(last.outputs[0])
    )
    return True


def _is_put_back(part: ir.Value | None, cut: ir.Node, result: ir.Value, joined: ir.Node) -> bool:
    """Whether columns are put together as they were cut up, the result in place of one part."""
    columns = all(node.attributes.get_int("axis", 0) in (-1, 2) for node in (cut, joined))
    alone = all(len(value.uses()) == 1 and not value.is_graph_output() for value in cut.outputs)
    return columns and alone and list(joined.inputs) == [result if one is part else one for one in cut.outputs]


def _heads_of(value: ir.Value | None, turned: ir.Node) -> tuple[int, int] | None:
    """Heads and columns of [M, H, R], if the node turns all of both."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    _, heads, columns = value.shape
    all_columns = turned.attributes.get_int("rotary_embedding_dim", 0) == 0
    if not isinstance(columns, int) or heads != turned.attributes.get_int("num_heads", 0) or not all_columns:
        return None
    return int(heads), columns
