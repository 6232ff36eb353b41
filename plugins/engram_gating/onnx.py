"""engram_gating as ONNX: the two norms and their product are three means over channels.

The weights of both norms are multiplied first, which leaves one product of their size for all tokens.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset

#: ``EngramGate`` is an operator of onnxruntime.
OP_TYPE = "EngramGating"
ATTRIBUTES = {"eps": "FLOAT"}
OUTPUTS = (first_dtype,)


def translate(streams, keys, value, q_weight, k_weight, eps):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).EngramGating(streams, keys, value, q_weight, k_weight, eps=eps, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (streams [M,X,D], keys [M,X,D], value [M,D], q_weight [X,D], k_weight [X,D]) -> u [M,X,D]."""
    eps, D = node.attributes["eps"].as_float(), int(node.inputs[0].shape[2])  # type: ignore[union-attr,index,arg-type]
    formals = [ir.val(name) for name in ("streams", "keys", "value", "q_weight", "k_weight")]

    def write(b: Body) -> list[ir.Value]:
        streams, keys, value, q_weight, k_weight = (
            b.convert(formal, operand.dtype, ir.DataType.FLOAT)  # type: ignore[union-attr]
            for formal, operand in zip(formals, node.inputs, strict=True)
        )
        channels, shift = b.const([-1]), b.const(eps, np.float32)

        def mean(one: ir.Value, other: ir.Value) -> ir.Value:
            return b.op("ReduceMean", b.op("Mul", one, other), channels, keepdims=1)

        def rms(x: ir.Value) -> ir.Value:
            return b.op("Sqrt", b.op("Add", mean(x, x), shift))

        dot = mean(b.op("Mul", streams, b.op("Mul", q_weight, k_weight)), keys)
        scaled = b.op("Mul", dot, b.const(D**0.5, np.float32))
        # A product of roots, as the square of a small eps is no float32.
        g = b.op("Div", scaled, b.op("Mul", rms(streams), rms(keys)))
        root = b.op("Sqrt", b.op("Max", b.op("Abs", g), b.const(1e-6, np.float32)))
        signed = b.op("Where", b.op("Less", g, b.const(0, np.float32)), b.op("Neg", root), root)
        u = b.op("Mul", b.op("Sigmoid", signed), b.op("Unsqueeze", value, b.const([1])))
        u = b.convert(u, ir.DataType.FLOAT, first_dtype(node))
        u.name = "u"
        return [u]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
