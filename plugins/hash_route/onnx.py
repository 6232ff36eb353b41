"""hash_route as ONNX: the body in standard operators."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset
from v4export.plugins.moe_route.onnx import expert_scores, expert_weights

OP_TYPE = "HashRoute"
ATTRIBUTES = {"scoring": "STRING", "norm": "INT", "scale": "FLOAT"}
OUTPUTS = (lambda _: ir.DataType.FLOAT, lambda _: ir.DataType.INT64)


def translate(logits, table, ids, scoring, norm, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).HashRoute(logits, table, ids, scoring=scoring, norm=int(norm), scale=scale, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (logits [M,E], table [V,K], ids [M]) -> (weights [M,K], indices [M,K])."""
    a = {name: node.attributes[name].value for name in ATTRIBUTES}
    logits, table, ids = ir.val("logits"), ir.val("table"), ir.val("ids")

    def write(b: Body) -> list[ir.Value]:
        idx = b.op("Gather", table, ids, axis=0)
        weights = expert_weights(b, expert_scores(b, logits, a["scoring"]), idx, bool(a["norm"]), a["scale"])
        weights.name, idx.name = "weights", "indices"
        return [weights, idx]

    return make_function(OP_TYPE, [logits, table, ids], write, [*ATTRIBUTES, *PLUGIN_HINTS])
