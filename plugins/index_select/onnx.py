"""index_select as ONNX: scores of keys held and of new keys, side by side, and TopK.

Of equal scores TopK takes the lower index, which is the lower number.
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset
from v4export.plugins.index_bodies import Keys

OP_TYPE = "IndexSelect"
ATTRIBUTES = {"top_k": "INT", "ratio": "INT", "scale": "FLOAT"}
OUTPUTS = (lambda _: ir.DataType.INT64,)


def translate(q, weights, new, cache, position, top_k, ratio, scale):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).IndexSelect(
        q, weights, new, cache, position, top_k=top_k, ratio=ratio, scale=scale, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,I], weights [M,H], new keys [B,U,I], keys [B,C,I], position [B]) -> numbers [M,K]."""
    top_k = node.attributes["top_k"].as_int()
    q, weights, new, cache, position = formals = [ir.val(n) for n in ("q", "weights", "new", "cache", "position")]

    def write(b: Body) -> list[ir.Value]:
        keys = Keys(b, node, [q, weights, new, cache], position)
        place = keys.best(b.op("Concat", keys.held, keys.new, axis=-1), top_k, keys.count)
        # New keys stand behind all rows of the cache, those included that hold no key yet.
        size = b.dim(cache, 1)
        behind = b.op("Add", b.op("Sub", place, size), keys.step.held(keys.ratio))
        return [keys.by_query(b.op("Where", b.op("Less", place, size), place, behind), "numbers")]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
