"""candidate_select as ONNX: scores put in the order of numbers, TopK of them, and TopK of the blocks' maxima."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset
from v4export.plugins.index_bodies import Keys

OP_TYPE = "CandidateSelect"
ATTRIBUTES = {"top_k": "INT", "ratio": "INT", "scale": "FLOAT", "top_blocks": "INT", "block_size": "INT"}
OUTPUTS = (lambda _: ir.DataType.INT64, lambda _: ir.DataType.INT64)


def translate(q, weights, new, cache, position, top_k, ratio, scale, top_blocks, block_size):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    attributes = dict(top_k=top_k, ratio=ratio, scale=scale, top_blocks=top_blocks, block_size=block_size)
    return opset(DOMAIN).CandidateSelect(q, weights, new, cache, position, **attributes, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (q [M,H,I], weights [M,H], new keys [B,U,I], keys [B,C,I], position [B]) -> numbers [M,K],
    blocks [M,K']."""
    top_k, top_blocks, size = (node.attributes[name].as_int() for name in ("top_k", "top_blocks", "block_size"))
    *operands, position = formals = [ir.val(n) for n in ("q", "weights", "new", "cache", "position")]

    def write(b: Body) -> list[ir.Value]:
        keys = Keys(b, node, operands, position)
        scores, count = keys.blocks(size)
        numbers = keys.best(keys.in_a_row(scores), top_k, keys.count)
        # Rounded up, not down from the newest key: where none is visible no block is the one before the first.
        some = b.op("Div", b.op("Add", keys.step.complete(keys.ratio), b.const(size - 1)), b.const(size))
        is_newest = b.op("Equal", b.arange(count), b.op("Sub", some, b.const(1)))
        best = b.op("ReduceMax", scores, b.const([-1]), keepdims=0)
        best = b.op("Where", is_newest, b.const(np.finfo(np.float32).max, np.float32), best)
        blocks = keys.best(best, top_blocks, count)
        return [keys.by_query(numbers, "numbers"), keys.by_query(blocks, "blocks")]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
