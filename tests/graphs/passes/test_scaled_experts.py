"""Experts of every narrow format in files, lowered for a CPU, against the portable bodies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from v4export.checkpoint.narrow import narrow, outer_scale
from v4export.graphs.lower import bodies_for_cpu, lower_for_cpu
from v4export.graphs.passes.regions import regions
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.stamp import portable_bodies
from v4export.plugins.function_body import OPSET, VERSION, Body
from v4export.precision import FORMATS

E, K, D, F = 6, 2, 128, 64
KINDS = ("matrix", "scale", "scale_2")
SHAPES = {"gate": (F, D), "up": (F, D), "down": (D, F)}
#: Every format with multipliers; FP8 in blocks that are small enough for several.
STORED = {f.name: f for f in FORMATS.values() if f.scaled} | {"fp8": replace(FORMATS["fp8"], block=(16, 16))}
RNG = np.random.default_rng(0)


def content(stored: str, shape: tuple[int, int]) -> dict[str, tuple[bytes, ir.DataType, tuple[int, ...]]]:
    """A matrix, its multipliers and theirs as a file has them, and their types and shapes."""
    format = STORED[stored]
    w = (RNG.normal(size=shape) * np.exp(RNG.normal(size=(shape[0], 1)))).astype(np.float32)
    scale_2 = outer_scale(float(np.abs(w).max())) if format.outer else None
    found = narrow(w, format, scale_2)
    dtypes = (format.dtype, format.scale, "float32")
    shapes = (shape, found.scale.shape, (1, 1))
    return {
        kind: (array.tobytes(), ir.DataType.from_numpy(numpy_dtype(dtype)), size)
        for kind, array, dtype, size in zip(KINDS, found, dtypes, shapes, strict=True)
        if array is not None
    }


def by_expert(e: int, part: str, kind: str) -> tuple:
    return (0, e, part, kind)


def by_name(e: int, part: str, kind: str) -> tuple:
    """As safetensors sorts them: by type, then by name."""
    return (0, kind, str(e), part)


def in_two_files(e: int, part: str, kind: str) -> tuple:
    return (e // 4, e, kind, part)


def experts(folder: Path, stored: str, place, activations: ir.DataType, count: int = E, gap: int = 0) -> Path:
    """A graph of one MoeExperts node, whose matrices lie in files in the order of ``place``, ``gap`` bytes apart."""
    found = {}
    for e in range(count):
        for part, shape in SHAPES.items():
            for kind, (data, dtype, size) in content(stored, shape).items():
                found[e, part, kind] = (data, dtype, (1, *size))
    values, files = {}, {0: b"head", 1: b"other head"}
    for key in sorted(found, key=lambda key: place(*key)):
        data, dtype, shape = found[key]
        file, name = place(*key)[0], ".".join(map(str, key))
        tensor = ir.ExternalTensor(
            f"{file}.bin", len(files[file]), len(data), dtype, shape=ir.Shape(shape), name=name, base_dir=folder
        )
        values[key] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
        files[file] += data + bytes(gap)
    for file, data in files.items():
        (folder / f"{file}.bin").write_bytes(data)
    x, share, chosen = (
        ir.Value(name=name, shape=ir.Shape(["M", width]), type=ir.TensorType(dtype))
        for name, width, dtype in (
            ("x", D, activations), ("weights", K, ir.DataType.FLOAT), ("indices", K, ir.DataType.INT64),
        )
    )  # fmt: skip
    b = Body()
    kinds = KINDS if STORED[stored].outer else KINDS[:2]
    operands = [values[e, part, kind] for kind in kinds for part in SHAPES for e in range(count)]
    rows, columns = STORED[stored].block
    y = b.op(
        "MoeExperts", x, share, chosen, *operands, domain="v4", num_experts=count, rows=rows, columns=columns,
        format=stored, limit=5.0,
    )  # fmt: skip
    y.dtype, y.shape = activations, ir.Shape([None, D])
    out = b.cast(y, ir.DataType.FLOAT)
    out.name, out.dtype, out.shape = "y", ir.DataType.FLOAT, ir.Shape(["M", D])
    graph = ir.Graph(
        [x, share, chosen], [out], nodes=b.nodes, initializers=values.values(),
        opset_imports={"": OPSET, "v4": VERSION, "trt": VERSION}, name="g",
    )  # fmt: skip
    ir.save(ir.Model(graph, ir_version=10, functions=portable_bodies(b.nodes)), folder / "model.onnx")
    return folder / "model.onnx"


def run(model: ir.Model, folder: Path, chosen: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    rng = np.random.default_rng(len(chosen))
    x = rng.normal(size=(len(chosen), D)).astype(np.float32)
    dtype = model.graph.inputs[0].dtype
    if dtype == ir.DataType.FLOAT:
        value = ort.OrtValue.ortvalue_from_numpy(x)
    else:
        bits = x.astype(dtype.numpy()).view(np.uint16)
        value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(dtype))
    feeds = {
        "x": value,
        "weights": ort.OrtValue.ortvalue_from_numpy(rng.random(chosen.shape, np.float32)),
        "indices": ort.OrtValue.ortvalue_from_numpy(chosen),
    }
    ir.save(model, folder / "lowered.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(folder / "lowered.onnx", options, providers=["CPUExecutionProvider"])
    return session.run_with_ort_values(["y"], feeds)[0].numpy()


def choices(tokens: int) -> np.ndarray:
    rng = np.random.default_rng(tokens)
    return np.stack([rng.permutation(E)[:K] for _ in range(tokens)])


#: Formats whose widened numbers are bfloat16 in every graph, so that sums alone may differ; and the others, which are
#: rounded to it, and stand in graphs of that type alone.
EXACT = [name for name, f in STORED.items() if f.scale == "float32" or f.power_of_two]


def activations(stored: str) -> tuple[ir.DataType, float]:
    """The type of the tests' activations, and what sums in another order may change."""
    return (ir.DataType.FLOAT, 1e-4) if stored in EXACT else (ir.DataType.BFLOAT16, 2.0**-7)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("place", [by_expert, by_name, in_two_files])
@pytest.mark.parametrize("stored", STORED)
def test_same_numbers_wherever_experts_lie(tmp_path, stored, place, tokens):
    dtype, step = activations(stored)
    path = experts(tmp_path, stored, place, dtype)
    wanted, got = (run(lower(path), tmp_path, choices(tokens)) for lower in (bodies_for_cpu, lower_for_cpu))
    np.testing.assert_allclose(got, wanted, rtol=step, atol=step * np.abs(wanted).max())


@pytest.mark.parametrize("gap", [1, 6, 64])
@pytest.mark.parametrize("stored", STORED)
def test_any_distance_between_tensors(tmp_path, stored, gap):
    """Multipliers an odd number of bytes apart cannot be rows of their type, and are copied."""
    dtype, step = activations(stored)
    path = experts(tmp_path, stored, by_expert, dtype, gap=gap)
    wanted, got = (run(lower(path), tmp_path, choices(5)) for lower in (bodies_for_cpu, lower_for_cpu))
    np.testing.assert_allclose(got, wanted, rtol=step, atol=step * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("stored", "dtype"), [*((s, ir.DataType.BFLOAT16) for s in STORED), *((s, ir.DataType.FLOAT16) for s in EXACT)]
)
def test_16_bits_round_where_the_bodies_do(tmp_path, stored, dtype):
    path = experts(tmp_path, stored, by_name, dtype)
    wanted, got = (run(lower(path), tmp_path, choices(9)) for lower in (bodies_for_cpu, lower_for_cpu))
    assert (got.astype(dtype.numpy()) == got).all()
    # Sums in another order may round the last bit of a number on the way differently.
    step = float(ml_dtypes.finfo(dtype.numpy()).eps) * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=step)
    assert (got == wanted).mean() > 0.95


@pytest.mark.parametrize("stored", STORED)
def test_no_expert_is_widened_when_the_graph_is_loaded(tmp_path, stored):
    path, kept = experts(tmp_path, stored, by_name, ir.DataType.BFLOAT16), tmp_path / "optimized.onnx"
    run(lower_for_cpu(path), tmp_path, choices(3), kept)
    floats = [t for t in all_initializers(onnx.load(kept, load_external_data=False).graph) if t.data_type == 1]
    # The largest constants are the tables.
    assert {math.prod(t.dims) for t in floats if not t.name.startswith("table.")} < {*range(E * F * D // 32 + 1)}
    assert max(math.prod(t.dims) for t in floats) <= 64 * 256


def all_initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.initializer, *(t for g in inner for t in all_initializers(g))]


@pytest.mark.parametrize("stored", STORED)
def test_nodes_and_initialisers_do_not_grow_with_experts(tmp_path, stored):
    sizes = set()
    for count in (2, 32):
        model = lower_for_cpu(experts(tmp_path, stored, by_name, activations(stored)[0], count))
        sizes.add((len(list(ir.traversal.RecursiveGraphIterator(model.graph))), len(model.graph.initializers)))
    assert len(sizes) == 1 and next(iter(sizes))[0] < 220


def tensors(folder: Path, spots: Sequence[tuple[str, int, int]]) -> list[ir.Value]:
    found = []
    for file, offset, length in spots:
        name = f"{file}.{offset}"
        tensor = ir.ExternalTensor(
            file, offset, length, ir.DataType.UINT8, shape=ir.Shape([length]), name=name, base_dir=folder
        )
        found.append(ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype)))
    return found


def test_rows_divide_every_distance(tmp_path):
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="g")
    spots = [("a", 1000, 24), ("b", 5, 24), ("a", 1060, 36), ("a", 1024, 24)]
    first, second = regions(graph, tensors(tmp_path, spots), ir.DataType.UINT8)
    assert [r.rows.const_value.offset for r in (first, second)] == [1000, 5]
    assert first.rows.shape == (8, 12) and second.rows.shape == (2, 12)
    assert first.first.tolist() == [0, 0, 5, 2] and first.end.tolist() == [2, 0, 8, 4]
    assert second.first.tolist() == [0, 0, 0, 0] and second.end.tolist() == [0, 2, 0, 0]
