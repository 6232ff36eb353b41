"""compressed_attention as ONNX: a ring, new rows, entries held and new ones, scored apart and never joined."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Step

OP_TYPE = "CompressedAttention"
ATTRIBUTES = {"ratio": "INT", "scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, new, ring, new_entry, entry, position, sinks, ratio, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).CompressedAttention(
        q, new, ring, new_entry, entry, position, sinks, ratio=ratio, scale=scale, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], new [B,S,W], ring [B,R,W], new entries [B,U,W], entries [B,C,W], position [B], sinks [H])
    -> z [M,H,W]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    names = ("q", "new", "ring", "new_entry", "entry", "position", "sinks")
    q, new, ring, new_entry, entry, position, sinks = formals = [ir.val(name) for name in names]

    def write(b: Body) -> list[ir.Value]:
        step = Step(b, operands, b.dim(new, 0), b.dim(new, 1), position)
        segments = [*step.window(new, ring), *step.entries(new_entry, entry, b.attribute("ratio"))]
        return [step.attend(q, segments, scale, sinks)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
