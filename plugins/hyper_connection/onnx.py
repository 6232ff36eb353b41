"""hyper_connection as ONNX: the body in standard operators, Sinkhorn's iterations unrolled.

A matrix is kept as a row of X*X numbers, and the sums of its rows or columns, each where it is divided by, are one
small product plus eps: two nodes for half an iteration. That is half the time of ReduceSum, Add and Div for one token
in onnxruntime, and a tenth for 512.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset

OP_TYPE = "HyperConnection"
ATTRIBUTES = {"num_streams": "INT", "iterations": "INT", "eps": "FLOAT", "norm_eps": "FLOAT"}
OPERANDS = ("streams", "fn", "base", "scale")
OUTPUTS = (first_dtype, lambda _: ir.DataType.FLOAT, lambda _: ir.DataType.FLOAT)


def translate(streams, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    count = int(streams.shape[1])
    return opset(DOMAIN).HyperConnection(
        streams, fn, base, scale, num_streams=count, iterations=iterations, eps=eps, norm_eps=norm_eps, **PLUGIN_HINTS
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (streams [M,X,D], fn [(2+X)*X,X*D], base [(2+X)*X], scale [3]) -> z [M,D], post [M,X], comb [M,X,X]."""
    dtype = first_dtype(node)
    streams, *weights = formals = [ir.val(name) for name in OPERANDS]

    def write(b: Body) -> list[ir.Value]:
        wide, one = b.convert(streams, dtype, ir.DataType.FLOAT), b.const([1])
        pre, post, comb = coefficients(b, node, wide, *weights)
        z = b.op("Squeeze", b.op("MatMul", b.op("Unsqueeze", pre, one), wide), one)
        z = b.convert(z, ir.DataType.FLOAT, dtype)
        z.name, post.name, comb.name = "z", "post", "comb"
        return [z, post, comb]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])


def coefficients(
    b: Body, node: ir.Node, wide: ir.Value, fn: ir.Value, base: ir.Value, scale: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """pre [M,X], post [M,X] and comb [M,X,X] of the streams in float32, by the node's attributes."""
    X, iterations, eps, norm_eps = (node.attributes[name].value for name in ATTRIBUTES)
    scales = b.op("Gather", scale, b.const([0] * X + [1] * X + [2] * X * X), axis=0)
    mixes = b.op("Add", b.op("Mul", _of_the_normed(b, wide, fn, norm_eps), scales), base)
    pre, post, comb = b.ops("Split", mixes, b.const([X, X, X * X]), outputs=3, axis=-1)
    shift = b.const(eps, np.float32)
    pre = b.op("Add", b.op("Sigmoid", pre), shift)
    post = b.op("Mul", b.op("Sigmoid", post), b.const(2, np.float32))
    rows = b.op("Add", b.op("Softmax", b.reshape(comb, -1, X), axis=-1), shift)
    comb = b.reshape(_sinkhorn(b, b.reshape(rows, -1, X * X), X, iterations, eps), -1, X, X)
    return pre, post, comb


def _of_the_normed(b: Body, wide: ir.Value, fn: ir.Value, eps: float) -> ir.Value:
    """``fn`` times the flattened streams over their root mean square; the few products are divided, not the streams."""
    flat = b.op("Flatten", wide, axis=1)
    mean = b.op("ReduceMean", b.op("Mul", flat, flat), b.const([-1]), keepdims=1)
    rms = b.op("Sqrt", b.op("Add", mean, b.const(eps, np.float32)))
    return b.op("Div", b.op("Gemm", flat, fn, transB=1), rms)


def _sinkhorn(b: Body, comb: ir.Value, X: int, iterations: int, eps: float) -> ir.Value:
    """Columns divided by their sums; then rows and columns for each further iteration. Row-major [M, X*X]."""
    row, column = np.divmod(np.arange(X * X), X)
    same_row, same_column = (b.const(at[:, None] == at, np.float32) for at in (row, column))
    padding = b.const(np.full(X * X, eps), np.float32)
    for same in [same_column, *[same_row, same_column] * (iterations - 1)]:
        comb = b.op("Div", comb, b.op("Gemm", comb, same, padding))
    return comb
