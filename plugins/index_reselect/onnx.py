"""index_reselect as ONNX: scores put in the order of numbers, those outside the blocks hidden, TopK."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset
from v4export.plugins.index_bodies import Keys

OP_TYPE = "IndexReselect"
ATTRIBUTES = {"top_k": "INT", "ratio": "INT", "scale": "FLOAT", "block_size": "INT"}
OUTPUTS = (lambda _: ir.DataType.INT64,)


def translate(q, weights, new, cache, blocks, position, top_k, ratio, scale, block_size):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    attributes = dict(top_k=top_k, ratio=ratio, scale=scale, block_size=block_size)
    return opset(DOMAIN).IndexReselect(q, weights, new, cache, blocks, position, **attributes, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,I], weights [M,H], new keys [B,U,I], keys [B,C,I], blocks [M,B'], position [B]) ->
    numbers [M,K]."""
    top_k, size = node.attributes["top_k"].as_int(), node.attributes["block_size"].as_int()
    *operands, blocks, position = formals = [ir.val(n) for n in ("q", "weights", "new", "cache", "blocks", "position")]

    def write(b: Body) -> list[ir.Value]:
        keys = Keys(b, node, operands, position)
        scores, count = keys.blocks(size)
        chosen = keys.in_a_row(blocks)
        marked = keys.step.mark(chosen, b.op("GreaterOrEqual", chosen, b.const(0)), count)
        scores = keys.only(b.op("Unsqueeze", marked, b.const([-1])), scores)
        return [keys.by_query(keys.best(keys.in_a_row(scores), top_k, keys.count), "numbers")]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
