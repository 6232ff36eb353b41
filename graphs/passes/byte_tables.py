"""What the bytes of stored matrices stand for, as tables that a graph looks them up in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_BYTES = np.arange(256, dtype=np.uint8)


def _halves_of(kind: type) -> tuple[np.ndarray, ...]:
    """For the low and the high half of each byte its number."""
    return tuple(half.view(kind).astype(np.float32) for half in (_BYTES & 15, _BYTES >> 4))


#: Float32 numbers [256] of each byte, by the type of a matrix: one table; of packed numbers one for each half, the even
#: column in the low bits.
TABLES: dict[ir.DataType, tuple[np.ndarray, ...]] = {
    ir.DataType.FLOAT8E4M3FN: (_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32),),
    ir.DataType.INT8: (_BYTES.view(np.int8).astype(np.float32),),
    ir.DataType.FLOAT4E2M1: _halves_of(ml_dtypes.float4_e2m1fn),
    ir.DataType.INT4: _halves_of(ml_dtypes.int4),
}


def shared(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The graph's initialiser of that name, made if it is not there."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]
