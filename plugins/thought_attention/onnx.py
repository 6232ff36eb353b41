"""thought_attention as ONNX: a sequence's rows scored for all of its thoughts, each thought's own beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Segment, Step

OP_TYPE = "ThoughtAttention"
ATTRIBUTES = {"latent_width": "INT", "scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, own, cache, thought_at, latent_width, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).ThoughtAttention(
        q, own, cache, thought_at, latent_width=latent_width, scale=scale, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], own [M,P,W], cache [B,T,W], thought_at [B,Q]) -> z [M,H,L]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    latent = node.attributes["latent_width"].as_int()
    q, own, cache, at = formals = [ir.val(n) for n in ("q", "own", "cache", "thought_at")]

    def write(b: Body) -> list[ir.Value]:
        batch, thoughts = b.dim(at, 0), b.dim(at, 1)
        step = Step(b, operands, batch, thoughts)
        held = b.op("LessOrEqual", b.arange(b.dim(cache, 1)), b.op("Unsqueeze", at, b.const([2])))
        rows = b.reshape(operands.widen(b, own), batch, thoughts, -1, operands.width)
        # One row a thought, the same for all: it broadcasts over them.
        always = b.op("Constant", value=ir.tensor(np.ones((1, 1, 1), bool)))
        segments = [Segment(operands.widen(b, cache), held), Segment(rows, always, own=True)]
        return [step.attend(q, segments, scale, value_width=latent)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
