"""to_fp8 and from_fp8 as standard nodes. Their multiplier is 1: those of rows differ, which TensorRT refuses here."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset23

from v4export.plugins.fp8_rows.op import from_fp8, to_fp8

_E4M3 = int(ir.DataType.FLOAT8E4M3FN)


def _to_fp8(x: Any) -> Any:
    return opset23.QuantizeLinear(x, _one(), output_dtype=_E4M3)


def _from_fp8(x: Any) -> Any:
    return opset23.DequantizeLinear(x, _one())


def _one() -> Any:
    return opset23.Constant(value_float=1.0)


#: From a torch op to what writes its nodes.
TRANSLATIONS = {to_fp8: _to_fp8, from_fp8: _from_fp8}
