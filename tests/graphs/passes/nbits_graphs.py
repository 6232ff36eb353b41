"""Random matrices of integers in a file, as an export leaves them, for the tests of onnxruntime's kernels for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from v4export.checkpoint.narrow import Narrow, narrow
from v4export.graphs.lower import lower_for_cpu
from v4export.graphs.passes.accuracy import set_accuracy
from v4export.graphs.repacked import Repacking
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.stamp import portable_bodies
from v4export.plugins.function_body import OPSET, VERSION, Body
from v4export.precision import FORMATS

FILE = "w.bin"


class Stored:
    """Matrices written one behind the other, and their initialisers."""

    def __init__(self, folder: Path, stored: str, seed: int = 0) -> None:
        self.folder, self.format, self.rng = folder, FORMATS[stored], np.random.default_rng(seed)
        self.matrices: dict[str, Narrow] = {}
        self.values: dict[str, ir.Value] = {}
        (folder / FILE).write_bytes(b"head")

    def matrix(self, name: str, shape: tuple[int, int], lead: tuple[int, ...] = ()) -> tuple[ir.Value, ir.Value]:
        """A random one of that name, and its multipliers; the graph sees dimensions of 1 in front."""
        w = self.rng.normal(size=shape) * np.exp(self.rng.normal(size=(shape[0], 1)))
        found = self.matrices[name] = narrow(w.astype(np.float32), self.format)
        assert found.numbers.shape[0] == shape[0]
        return (
            self._value(name, found.numbers, self.format.dtype, (*lead, *shape)),
            self._value(f"{name}_scale_inv", found.scale, self.format.scale, (*lead, *found.scale.shape)),
        )

    def plain(self, name: str, array: np.ndarray, dtype: str) -> ir.Value:
        """A tensor as it is."""
        return self._value(name, array.astype(numpy_dtype(dtype)), dtype, array.shape)

    def _value(self, name: str, array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> ir.Value:
        with open(self.folder / FILE, "ab") as file:
            offset = file.tell()
            file.write(array.tobytes())
        kind = ir.DataType.from_numpy(numpy_dtype(dtype))
        tensor = ir.ExternalTensor(
            FILE, offset, array.nbytes, kind, shape=ir.Shape(shape), name=name, base_dir=self.folder
        )
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(kind), const_value=tensor)
        self.values[name] = value
        return value

    def save(self, b: Body, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> Path:
        """The portable graph of those nodes, which become float32 at its ends."""
        ends = []
        for i, value in enumerate(outputs):
            end = b.cast(value, ir.DataType.FLOAT)
            end.name, end.dtype, end.shape = f"y{i}", ir.DataType.FLOAT, ir.Shape([None] * len(value.shape or ()))
            ends.append(end)
        imports = {"": OPSET, "v4": VERSION, "trt": VERSION}
        graph = ir.Graph(
            inputs, ends, nodes=b.nodes, initializers=self.values.values(), opset_imports=imports, name="g"
        )
        ir.save(ir.Model(graph, ir_version=10, functions=portable_bodies(b.nodes)), self.folder / "model.onnx")
        return self.folder / "model.onnx"


def given(name: str, dims: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
    """A graph input."""
    return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))


def repacked_copy(path: Path, level: int = 0) -> ir.Model:
    """The copy for a CPU with onnxruntime's kernels, its weights written, at an accuracy level."""
    repacking = Repacking()
    model = lower_for_cpu(path, repacking)
    repacking.write(path.parent)
    set_accuracy(model, level)
    return model


def counts(model: ir.Model) -> dict[str, int]:
    """How many nodes of each type a graph has."""
    types = [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]
    return {op_type: types.count(op_type) for op_type in set(types)}


def run(model: ir.Model, folder: Path, feeds: Mapping[str, np.ndarray], prepack: bool = True) -> list[np.ndarray]:
    """What it computes, inputs cast to their types."""
    dtypes = {v.name: v.dtype for v in model.graph.inputs}
    ir.save(model, folder / "lowered.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(folder / "lowered.onnx", options, providers=["CPUExecutionProvider"])
    values = {}
    for name, array in feeds.items():
        dtype = dtypes[name]
        assert dtype is not None
        array = array.astype(dtype.numpy())
        narrow_type = dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
        values[name] = (
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(dtype))
            if narrow_type
            else ort.OrtValue.ortvalue_from_numpy(array)
        )
    return [value.numpy() for value in session.run_with_ort_values(None, values)]
