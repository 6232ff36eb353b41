"""hyper_mix as ONNX: the body in standard operators.

The sublayer's output is one more stream, and its shares one more row of the matrix: a single product. onnxruntime's own
HyperConnectionPostMix takes 3 to 27 times as long (``README.md``).
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset

OP_TYPE = "HyperMix"
ATTRIBUTES: dict[str, str] = {}
OUTPUTS = (first_dtype,)


def translate(streams, y, post, comb):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).HyperMix(streams, y, post, comb, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body: (streams [M,X,D], y [M,D], post [M,X], comb [M,X,X]) -> streams [M,X,D]."""
    dtype = first_dtype(node)
    streams, y, post, comb = (ir.val(name) for name in ("streams", "y", "post", "comb"))

    def write(b: Body) -> list[ir.Value]:
        one = b.const([1])
        sources = b.op("Concat", streams, b.op("Unsqueeze", y, one), axis=1)
        sources = b.convert(sources, dtype, ir.DataType.FLOAT)
        shares = b.op("Concat", comb, b.op("Unsqueeze", post, one), axis=1)
        mixed = b.op("MatMul", b.op("Transpose", shares, perm=[0, 2, 1]), sources)
        mixed = b.convert(mixed, ir.DataType.FLOAT, dtype)
        mixed.name = "mixed"
        return [mixed]

    return make_function(OP_TYPE, [streams, y, post, comb], write, PLUGIN_HINTS)
