"""index_select as ONNX: heads as rows of one product, a second product over heads, TopK.

Keys held and new keys are scored apart and never joined; of equal scores TopK takes the lower index, which is the lower
number.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, make_function, opset
from v4export.plugins.segment_bodies import LOWEST, Operands, Segment, Step

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
    operands, scale = Operands.of(node), node.attributes["scale"].as_float()
    top_k, ratio = node.attributes["top_k"].as_int(), node.attributes["ratio"].as_int()
    q, weights, new, cache, position = formals = [ir.val(n) for n in ("q", "weights", "new", "cache", "position")]

    def write(b: Body) -> list[ir.Value]:
        batch = b.dim(new, 0)
        steps = b.op("Div", b.dim(q, 0), batch)
        step = Step(b, operands, batch, steps, position)
        rows = b.reshape(operands.widen(b, q), batch, -1, operands.width)
        factors = b.reshape(weights, batch, steps, 1, operands.heads)

        def score(keys: Segment) -> ir.Value:
            """[B, S, N]."""
            product = b.op("Relu", b.op("MatMul", rows, b.op("Transpose", keys.rows, perm=[0, 2, 1])))
            product = b.reshape(product, batch, steps, operands.heads, -1)
            total = b.op("Squeeze", b.op("MatMul", factors, product), b.const([2]))
            # Scaled last, as in PyTorch: scaled weights would tell apart sums that are equal.
            scaled = b.op("Mul", total, b.const(scale, np.float32))
            return b.op("Where", keys.visible, scaled, b.const(LOWEST, np.float32))

        scores = b.op("Concat", *map(score, step.entries(new, cache, ratio)), axis=-1)
        size = b.dim(cache, 1)
        count = b.op("Min", b.const([top_k]), b.op("Add", size, b.dim(new, 1)))
        best, place = b.ops("TopK", scores, count, outputs=2, axis=-1, largest=1, sorted=1)
        # New keys stand behind all rows of the cache, those included that hold no key yet.
        number = b.op(
            "Where", b.op("Less", place, size), place, b.op("Add", b.op("Sub", place, size), step.held(ratio))
        )
        seen = b.op("Where", b.op("Equal", best, b.const(LOWEST, np.float32)), b.const(-1), number)
        numbers = b.op("Reshape", seen, b.op("Concat", b.dim(q, 0), count, axis=0))
        numbers.name = "numbers"
        return [numbers]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
