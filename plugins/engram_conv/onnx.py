"""engram_conv as ONNX: the ring turned until its oldest token is first, then each token's taps looked up and summed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset

OP_TYPE = "EngramConv"
ATTRIBUTES = {"dilation": "INT"}
OUTPUTS = (first_dtype,)


def translate(rows, ring, weight, position, dilation):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).EngramConv(rows, ring, weight, position, dilation=dilation, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (rows [B,S,P], ring [B,R,P], weight [P,K], position [B]) -> out [B,S,P]."""
    dilation = node.attributes["dilation"].as_int()
    formals = [ir.val(name) for name in ("rows", "ring", "weight", "position")]

    def write(b: Body) -> list[ir.Value]:
        rows, ring, weight = (
            b.convert(formal, operand.dtype, ir.DataType.FLOAT)  # type: ignore[union-attr]
            for formal, operand in zip(formals[:3], node.inputs, strict=False)
        )
        every = b.op("Concat", _in_order(b, ring, formals[3]), rows, axis=1)
        # The last tap of new token s is row R + s, the first one R before.
        taps = b.op("Mul", b.arange(b.dim(weight, 1)), b.const(dilation))
        at = b.op("Add", b.reshape(b.arange(b.dim(rows, 1)), -1, 1), taps)
        products = b.op("Mul", b.op("Gather", every, at, axis=1), b.op("Transpose", weight, perm=[1, 0]))
        total = b.op("ReduceSum", products, b.const([2]), keepdims=0)
        out = b.op("Mul", total, b.op("Sigmoid", total))
        out = b.convert(out, ir.DataType.FLOAT, first_dtype(node))
        out.name = "out"
        return [out]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])


def _in_order(b: Body, ring: ir.Value, position: ir.Value) -> ir.Value:
    """The rows of tokens ``position - R .. position - 1`` [B, R, P], zeros for those before the first."""
    kept, first = b.dim(ring, 1), b.arange(b.dim(ring, 0))
    # A token's number plus R, which is in the same slot and not negative.
    token = b.op("Add", b.reshape(position, -1, 1), b.arange(kept))
    row = b.op("Add", b.op("Mod", token, kept), b.op("Mul", b.reshape(first, -1, 1), kept))
    flat = b.op("Reshape", ring, b.op("Concat", b.const([-1]), b.dim(ring, 2), axis=0))
    is_there = b.op("Unsqueeze", b.op("GreaterOrEqual", token, kept), b.const([-1]))
    return b.op("Where", is_there, b.op("Gather", flat, row, axis=0), b.const(0, np.float32))
