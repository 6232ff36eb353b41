"""E8M0 multipliers of experts as bfloat16 constants, for TensorRT, which widens by nothing else.

It takes no E8M0 constants, and none that are computed in the graph. So they are written once more, for engines alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from v4export.graphs.shards import Conversion, Placed
from v4export.plugins import BY_NODE

#: Writes tensors and says where each lies.
Write = Callable[[Sequence[Conversion]], Mapping[str, Placed]]
_DTYPE = "bfloat16"


def wide_multipliers(model: ir.Model, write: Write) -> bool:
    """Let every MoeExperts node read them so, in place; whether there were any."""
    nodes = [node for node in model.graph if node.op_type == "MoeExperts"]
    found = {v: None for node in nodes for v in node.inputs if v is not None and v.dtype == ir.DataType.UINT8}
    if not found:
        return False
    placed = write([_conversion(value) for value in found])
    for value in found:
        old, lies = value.const_value, placed[value.name or ""]
        assert isinstance(old, ir.ExternalTensor)
        how = {"shape": ir.Shape(old.shape), "name": value.name, "base_dir": old.base_dir}
        value.const_value = ir.ExternalTensor(lies.location, lies.offset, lies.nbytes, ir.DataType.BFLOAT16, **how)
        value.dtype = ir.DataType.BFLOAT16
    for node in nodes:
        body = BY_NODE[node.domain, node.op_type].function
        assert body is not None
        written = body(node)
        written.overload = node.overload
        model.functions[written.identifier()] = written
    return True


def _conversion(value: ir.Value) -> Conversion:
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor) and value.name

    shape = tuple(int(d) for d in tensor.shape)

    def powers() -> np.ndarray:
        # onnx-ir itself reads no hard links.
        stored = np.fromfile(tensor.path, ml_dtypes.float8_e8m0fnu, math.prod(shape), offset=tensor.offset or 0)
        return stored.reshape(shape).astype(ml_dtypes.bfloat16)

    return Conversion(value.name, _DTYPE, shape, lambda: iter([powers()]), lambda: (tensor.location, tensor.offset))
