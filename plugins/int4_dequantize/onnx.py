"""int4_dequantize as ONNX: TensorRT's own operator, which keeps the integers packed in the engine, and a body of the
same name for every other runtime.

``TRT_BlockDequantize`` refuses four-bit integers. TensorRT names the layer after its output, and refuses a second one
of a name; so a function that has such a node is inlined ahead of it (``graphs/lower.py``).
"""

from __future__ import annotations

import onnx_ir as ir

from v4export.plugins.function_body import Body, make_function, opset

OP_TYPE = "TRT_INT4DequantizeLinear"
DOMAIN = "trt"
ATTRIBUTES = {"axis": "INT", "block_size": "INT"}


def _scale_dtype(node: ir.Node) -> ir.DataType:
    scale = node.inputs[1]
    assert scale is not None and scale.dtype is not None
    return scale.dtype


OUTPUTS = (_scale_dtype,)


def translate(w, scale, columns):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op; its packed matrix is uint8 here and INT4 in the finished graph."""
    return opset(DOMAIN).TRT_INT4DequantizeLinear(w, scale, axis=1, block_size=columns)


def dequantize(b: Body, w: ir.Value, scale: ir.Value, rank: int, columns: int, dtype: ir.DataType) -> ir.Value:
    """A node that widens ``w`` [..., N, K] of so many dimensions by its ``scale`` [..., N, K/columns] of ``dtype``."""
    wide = b.op(OP_TYPE, w, scale, domain=DOMAIN, axis=rank - 1, block_size=columns)
    wide.dtype = dtype
    return wide


def function(node: ir.Node) -> ir.Function:
    """The body, for any rank and block size, which it sees in the shapes: blocks are of the last axis."""
    w, scale = ir.val("w"), ir.val("scale")

    def write(b: Body) -> list[ir.Value]:
        each = b.op("Concat", b.op("Shape", scale), b.const([-1]), axis=0)
        blocks = b.op("Reshape", b.cast(w, ir.DataType.FLOAT), each)
        grid = b.op("Unsqueeze", b.cast(scale, ir.DataType.FLOAT), b.const([-1]))
        wide = b.op("Reshape", b.op("Mul", blocks, grid), b.op("Shape", w))
        out = b.op("CastLike", wide, scale)
        out.name = "W"
        return [out]

    return make_function(OP_TYPE, [w, scale], write, ATTRIBUTES, domain=DOMAIN)
