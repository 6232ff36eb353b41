"""window_attention as ONNX: a ring and the new rows, scored apart and never joined."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Step

OP_TYPE = "WindowAttention"
ATTRIBUTES = {"scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, new, ring, position, sinks, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).WindowAttention(q, new, ring, position, sinks, scale=scale, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], new [B,S,W], ring [B,R,W], position [B], sinks [H]) -> z [M,H,W]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    q, new, ring, position, sinks = (ir.val(n) for n in ("q", "new", "ring", "position", "sinks"))

    def write(b: Body) -> list[ir.Value]:
        step = Step(b, operands, b.dim(new, 0), b.dim(new, 1), position)
        return [step.attend(q, step.window(new, ring), scale, sinks)]

    return make_function(OP_TYPE, [q, new, ring, position, sinks], write, [*ATTRIBUTES, *PLUGIN_HINTS])
