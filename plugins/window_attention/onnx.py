"""window_attention as ONNX: a ring and the new rows, scored apart and never joined."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Step

OP_TYPE = "WindowAttention"
ATTRIBUTES = {"scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, new, ring, position, sinks, scale, since_B=None):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    operands = [q, new, ring, position, sinks, *([] if since_B is None else [since_B])]
    return opset(DOMAIN).WindowAttention(*operands, scale=scale, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], new [B,S,W], ring [B,R,W], position [B], sinks [H], and since [B] if the node has it) ->
    z [M,H,W]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    names = ("q", "new", "ring", "position", "sinks", "since")
    q, new, ring, position, sinks, *since = formals = [ir.val(name) for name in names[: len(node.inputs)]]

    def write(b: Body) -> list[ir.Value]:
        step = Step(b, operands, b.dim(new, 0), b.dim(new, 1), position)
        return [step.attend(q, step.window(new, ring, *since), scale, sinks)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
