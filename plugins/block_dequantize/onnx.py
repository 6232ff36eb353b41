"""block_dequantize as ONNX: TensorRT's own operator, and a body of the same name for every other runtime.

TensorRT knows ``TRT_BlockDequantize`` by its name and keeps the FP8 bytes in the engine; onnxruntime inlines the body.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import opset23

from v4export.plugins.function_body import Body, make_function, opset

OP_TYPE = "TRT_BlockDequantize"
DOMAIN = "trt"
ATTRIBUTES = {"block_shape": "INTS", "output_dtype": "INT"}
OUTPUTS = (lambda node: ir.DataType(node.attributes["output_dtype"].as_int()),)


def at_least_two_blocks(shape: Sequence[int], block: Sequence[int]) -> list[int]:
    """A block shape that gives the same values with more than one block, where ``block`` covers the whole matrix.

    TensorRT-RTX refuses a grid of a single block. Two blocks with the same multiplier are the same; the caller doubles
    the multipliers along axis -2 if the returned shape differs from ``block``.
    """
    *outer, rows, columns = block
    single = shape[-2] <= rows and shape[-1] <= columns
    return [*outer, -(-shape[-2] // 2) if single else rows, columns]


def translate(w, scale, rows, columns, dtype):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    packed = w.dtype == ir.DataType.UINT8  # here, and FLOAT4E2M1 in the finished graph
    block = at_least_two_blocks([w.shape[0], w.shape[1] * (2 if packed else 1)], [rows, columns])
    if block[0] != rows:
        scale = opset23.Concat(scale, scale, axis=0)
    return opset(DOMAIN).TRT_BlockDequantize(w, scale, block_shape=block, output_dtype=int(dtype))


def dequantize(
    b: Body, w: ir.Value, scale: ir.Value, shape: Sequence[int], block: list[int], dtype: ir.DataType
) -> ir.Value:
    """A node that widens ``w`` [..., N, K] by its ``scale`` [..., ceil(N/rows), ceil(K/columns)]."""
    finer = at_least_two_blocks(shape, block)
    if finer != block:
        scale = b.op("Concat", scale, scale, axis=-2)
    wide = b.op(OP_TYPE, w, scale, domain=DOMAIN, block_shape=finer, output_dtype=int(dtype))
    wide.dtype = dtype
    return wide


def function(node: ir.Node) -> ir.Function:
    """The body, for any block shape and output type: each element's multiplier is looked up by its block."""
    w, scale = ir.val("w"), ir.val("scale")

    def write(b: Body) -> list[ir.Value]:
        block = b.op("Constant", value_ints=ir.RefAttr("value_ints", "block_shape", ir.AttributeType.INTS))
        grid = b.cast(scale, ir.DataType.FLOAT)
        for axis in (-2, -1):
            size = b.op("Gather", block, b.const([axis]), axis=0)
            length = b.op("Gather", b.op("Shape", w), b.const([axis]), axis=0)
            grid = b.op("Gather", grid, b.op("Div", b.arange(length), size), axis=axis)
        wide = b.op("Mul", b.cast(w, ir.DataType.FLOAT), grid)
        out = b.op("Cast", wide, to=ir.RefAttr("to", "output_dtype", ir.AttributeType.INT))
        out.name = "W"
        return [out]

    return make_function(OP_TYPE, [w, scale], write, ATTRIBUTES, domain=DOMAIN)
