"""round_to_fp8 as ONNX: the standard pair of nodes, which TensorRT makes a product of FP8 numbers of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript import opset23

from v4export.plugins.function_body import Body
from v4export.plugins.round_to_fp8.op import round_to_fp8

_FP8 = int(ir.DataType.FLOAT8E4M3FN)


def translate(x, scale):  # type: ignore[no-untyped-def]
    """The nodes for a call of the torch op. Division and product are float32, which is the scale's type."""
    codes = opset23.QuantizeLinear(x, scale, output_dtype=_FP8)
    return opset23.DequantizeLinear(codes, scale, output_dtype=int(x.dtype))


#: From the torch op to what writes its nodes.
TRANSLATIONS = {round_to_fp8: translate}


def rounded(b: Body, x: ir.Value, scale: ir.Value) -> ir.Value:
    """The same of float32 numbers in a body, by scales known at run time alone.

    TensorRT quantises by constants only, so numbers are divided first and quantised by 1.
    """
    one = b.const(1, np.float32)
    one.name = f"{one.name}.one"  # TensorRT takes another body's constant of the same name for it
    codes = b.op("QuantizeLinear", b.op("Div", x, scale), one, output_dtype=_FP8)
    wide = b.op("DequantizeLinear", codes, one, output_dtype=int(ir.DataType.FLOAT))
    return b.op("Mul", wide, scale)
