"""sparse_attention as ONNX: a ring, new rows and new entries scored for all queries, held entries gathered for each."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Step

OP_TYPE = "SparseAttention"
ATTRIBUTES = {"ratio": "INT", "scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, new, ring, new_entry, entry, selected, position, sinks, ratio, scale, since_B=None):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    operands = [q, new, ring, new_entry, entry, selected, position, sinks, *([] if since_B is None else [since_B])]
    return opset(DOMAIN).SparseAttention(*operands, ratio=ratio, scale=scale, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], new [B,S,W], ring [B,R,W], new entries [B,U,W], entries [B,C,W], selected [M,K],
    position [B], sinks [H], and since [B] if the node has it) -> z [M,H,W]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    names = ("q", "new", "ring", "new_entry", "entry", "selected", "position", "sinks", "since")
    formals = [ir.val(name) for name in names[: len(node.inputs)]]
    q, new, ring, new_entry, entry, selected, position, sinks, *since = formals

    def write(b: Body) -> list[ir.Value]:
        step = Step(b, operands, b.dim(new, 0), b.dim(new, 1), position)
        segments = [*step.window(new, ring, *since), *step.selected(selected, new_entry, entry, b.attribute("ratio"))]
        return [step.attend(q, segments, scale, sinks)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
