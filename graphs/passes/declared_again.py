"""Initialisers declared again with another type and shape over the bytes that they lie in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def declared_again(value: ir.Value, graph: ir.Graph, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """An initialiser of that type and shape, of as many bytes; nothing is copied where it lies in a file."""
    tensor, name = value.const_value, f"{value.name}.as_{dtype.name.lower()}"
    assert tensor is not None
    if name in graph.initializers:
        return graph.initializers[name]
    again: ir.TensorProtocol
    if isinstance(tensor, ir.ExternalTensor):
        again = ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, dtype, shape=ir.Shape(shape), name=name,
            base_dir=tensor.base_dir,
        )  # fmt: skip
    else:
        again = ir.tensor(np.frombuffer(tensor.tobytes(), dtype.numpy()).reshape(shape), name=name)
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=again)
    graph.register_initializer(made)
    return made
