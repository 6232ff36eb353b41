"""hyper_coefficients as ONNX: the first part of hyper_connection's body."""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.hyper_connection.onnx import ATTRIBUTES, OPERANDS, coefficients

OP_TYPE = "HyperCoefficients"
OUTPUTS = (lambda _: ir.DataType.FLOAT,) * 3


def translate(streams, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    count = int(streams.shape[1])
    return opset(DOMAIN).HyperCoefficients(
        streams, fn, base, scale, num_streams=count, iterations=iterations, eps=eps, norm_eps=norm_eps, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (streams [M,X,D], fn [(2+X)*X,X*D], base [(2+X)*X], scale [3]) -> pre [M,X], post [M,X],
    comb [M,X,X]."""
    streams, *weights = formals = [ir.val(name) for name in OPERANDS]

    def write(b: Body) -> list[ir.Value]:
        wide = b.convert(streams, first_dtype(node), ir.DataType.FLOAT)
        pre, post, comb = coefficients(b, node, wide, *weights)
        pre.name, post.name, comb.name = "pre", "post", "comb"
        return [pre, post, comb]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])
