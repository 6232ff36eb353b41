"""sparse_latent_attention as ONNX: new rows scored for all queries, held rows gathered for each."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import Operands, Step

OP_TYPE = "SparseLatentAttention"
ATTRIBUTES = {"latent_width": "INT", "scale": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(q, new, cache, selected, position, latent_width, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).SparseLatentAttention(
        q, new, cache, selected, position, latent_width=latent_width, scale=scale, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,W], new [B,S,W], cache [B,T,W], selected [M,K], position [B]) -> z [M,H,L]."""
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    latent = node.attributes["latent_width"].as_int()
    q, new, cache, selected, position = formals = [ir.val(n) for n in ("q", "new", "cache", "selected", "position")]

    def write(b: Body) -> list[ir.Value]:
        step = Step(b, operands, b.dim(new, 0), b.dim(new, 1), position)
        return [step.attend(q, step.selected(selected, new, cache), scale, value_width=latent)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
