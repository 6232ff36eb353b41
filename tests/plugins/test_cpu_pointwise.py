"""Pointwise kernels for a CPU beside PyTorch, and what the pass that asks for them takes and leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest
import torch
from kernel_checks import needs_compiler
from on_cpu import run_node

from v4export.graphs.passes.pointwise import fuse_pointwise, fuse_rounding
from v4export.graphs.passes.rotate_rows import rotate_rows
from v4export.graphs.stamp import IR_VERSION
from v4export.model.rope import rotate_first, rotate_last
from v4export.plugins import cpu
from v4export.plugins.function_body import OPSET, VERSION

pytestmark = [needs_compiler, pytest.mark.slow]
HERE = [target for target in cpu.TARGETS if target.needs <= cpu.features()]
DTYPES = {"": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: A vector and less, several with an odd rest, and enough for several tasks.
SHAPES = [(1, 5), (3, 67), (40, 1030)]


@pytest.mark.parametrize("target", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("activations", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_pytorchs(shape: tuple[int, int], activations: str, target: cpu.Target) -> None:
    dtype = DTYPES[activations]
    torch.manual_seed(0)
    a, b = (4 * torch.randn(shape)).to(dtype).float(), torch.randn(shape).to(dtype).float()
    weight = torch.randn(shape[1]).to(dtype).float()
    exact = {
        ("Round", (4 * torch.randn(shape),)): lambda x: x,
        ("Sum", (a, b)): lambda x, y: x + y,
        ("SwiGlu", (a, b)): lambda gate, up: torch.nn.functional.silu(gate.double().clamp(max=2)) * up.clamp(-2, 2),
        ("RmsNorm", (a, weight)): lambda x, w: torch.nn.functional.rms_norm(x.double(), x.shape[-1:], w.double(), 1e-3),
        ("RmsNorm", (a,)): lambda x: torch.nn.functional.rms_norm(x.double(), x.shape[-1:], eps=1e-3),
    }
    for (op, inputs), wanted in exact.items():
        got = run_node(op, inputs, {"activations": activations, "epsilon": 1e-3, "limit": 2.0}, target)
        # A rounding, which the last place of what is rounded may turn the other way.
        steps = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert torch.allclose(got.double(), wanted(*inputs).double(), rtol=1.01 * steps, atol=1e-7), op
        assert torch.equal(got, got.to(dtype).float()), op


@pytest.mark.parametrize("op", ["Sum", "SwiGlu"])
def test_inputs_of_two_shapes_are_an_error(op: str) -> None:
    with pytest.raises(Exception, match=f"{op}: inputs of two shapes"):
        run_node(op, (torch.zeros(2, 3), torch.zeros(1, 3)), {"activations": "", "limit": 0.0}, HERE[0])


@pytest.mark.parametrize("target", HERE, ids=lambda one: one.name)
@pytest.mark.parametrize("activations", DTYPES)
@pytest.mark.parametrize(
    ("case", "interleaved"), [((3, 2, 24), 1), ((70, 3, 38), 1), ((3, 2, 24), 0), ((1, 1, 38), 0)], ids=str
)
def test_rotation_is_the_models(
    case: tuple[int, int, int], interleaved: int, activations: str, target: cpu.Target
) -> None:
    dtype, (M, _, W) = DTYPES[activations], case
    torch.manual_seed(0)
    angle = torch.randn(1, M, 12 if W == 38 else 5)
    x, cos, sin, R = torch.randn(case).to(dtype), angle.cos(), angle.sin(), 2 * angle.shape[-1]
    begin = W - R if interleaved else 0
    wanted = (rotate_last if interleaved else rotate_first)(x, cos, sin)
    attributes = {"activations": activations, "begin": begin, "interleaved": interleaved}
    got = run_node("Rotate", (x.float(), cos, sin), attributes, target)
    torch.testing.assert_close(
        got.to(dtype), wanted, rtol={"": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}[activations], atol=1e-6
    )
    assert torch.equal(got, got.to(dtype).float())
    with pytest.raises(Exception, match="angles of other sizes"):
        run_node("Rotate", (x.float(), cos[..., :1], sin), attributes, target)


def test_what_is_taken() -> None:
    """SwiGLU in any type; sums and norms of 16 bits; and of those not what may be repeated."""
    assert fused(swiglu, ir.DataType.FLOAT) == ["SwiGlu"]
    assert fused(swiglu, ir.DataType.BFLOAT16) == ["Cast", "Cast", "SwiGlu"]
    assert fused(silu_of_another, ir.DataType.FLOAT) == ["Sigmoid", "Mul", "Mul"]
    for dtype, taken in ((ir.DataType.FLOAT, False), (ir.DataType.FLOAT16, True)):
        assert fused(lambda g, a, b: node(g, "Add", a, b), dtype) == ["Sum" if taken else "Add"]
        assert fused(norm(-1), dtype) == ["RmsNorm" if taken else "RMSNormalization"]
    assert fused(lambda g, a, b: node(g, "Add", a, b), ir.DataType.FLOAT16, (1, 8)) == ["Add"]
    assert fused(norm(0), ir.DataType.FLOAT16) == ["RMSNormalization"]


def test_swiglu_that_is_cut_off() -> None:
    assert fused(clipped((None, 7), (-7, 7)), ir.DataType.FLOAT) == ["SwiGlu"]
    for gate, up in [((None, 7), (-7, 8)), ((-7, 7), (-7, 7)), ((None, 7), (None, 7)), ((None, -7), (7, -7))]:
        assert fused(clipped(gate, up), ir.DataType.FLOAT) == ["Clip", "Clip", "SwiGlu"]


def test_norms_without_a_weight() -> None:
    assert fused(normed(), ir.DataType.FLOAT) == ["RmsNorm"]
    assert fused(normed(dtype=ir.DataType.FLOAT16), ir.DataType.FLOAT) == ["RmsNorm"]
    for other in (normed(power=3.0), normed(axis=0)):
        assert fused(other, ir.DataType.FLOAT) == ["Pow", "ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul"]


@pytest.mark.parametrize("cut", [0, 1, None])
def test_rotations(cut: int | None) -> None:
    """All of the columns, the first or the last; and not what is not turned as the model's is."""
    rest = ["Split", "Reshape", "RotaryEmbedding", "Reshape", "Concat"] if cut is not None else []
    how = {"how": rotate_rows, "other": (1, "M", 2), "shape": ("M", 2, 4 if cut is None else 9)}
    assert fused(turned(cut), ir.DataType.FLOAT, **how) == ["Rotate"]
    assert fused(turned(cut, heads=1), ir.DataType.FLOAT, **how) == (rest or ["Reshape", "RotaryEmbedding", "Reshape"])
    if cut is not None:
        swapped = fused(turned(cut, swapped=True), ir.DataType.FLOAT, **how)
        assert swapped == ["Split", "Rotate", "Concat"]


def test_rounding_there_and_back() -> None:
    def there(g: list[ir.Node], a: ir.Value, _: ir.Value) -> ir.Value:
        return cast(g, a, ir.DataType.BFLOAT16)

    def there_and_back(g: list[ir.Node], a: ir.Value, b: ir.Value) -> ir.Value:
        return cast(g, there(g, a, b), ir.DataType.FLOAT)

    assert fused(there_and_back, ir.DataType.FLOAT, how=fuse_rounding) == ["Round"]
    assert fused(there, ir.DataType.FLOAT, how=fuse_rounding) == ["Cast"]
    assert fused(there_and_back, ir.DataType.FLOAT16, how=fuse_rounding) == ["Cast", "Cast"]


def swiglu(g: list[ir.Node], gate: ir.Value, up: ir.Value) -> ir.Value:
    narrow = gate.dtype
    if narrow != ir.DataType.FLOAT:
        gate, up = cast(g, gate, ir.DataType.FLOAT), cast(g, up, ir.DataType.FLOAT)
    y = node(g, "Mul", node(g, "Mul", gate, node(g, "Sigmoid", gate)), up)
    return y if narrow == ir.DataType.FLOAT else cast(g, y, narrow)


def silu_of_another(g: list[ir.Node], gate: ir.Value, up: ir.Value) -> ir.Value:
    return node(g, "Mul", node(g, "Mul", up, node(g, "Sigmoid", gate)), up)


def norm(axis: int) -> Callable[[list[ir.Node], ir.Value, ir.Value], ir.Value]:
    return lambda g, a, b: node(g, "RMSNormalization", a, b, axis=axis)


def clipped(gate_bounds: tuple, up_bounds: tuple) -> Callable[[list[ir.Node], ir.Value, ir.Value], ir.Value]:
    def make(g: list[ir.Node], gate: ir.Value, up: ir.Value) -> ir.Value:
        bounds = ((gate, gate_bounds), (up, up_bounds))
        gate, up = (node(g, "Clip", x, *(None if b is None else constant(b) for b in both)) for x, both in bounds)
        return swiglu(g, gate, up)

    return make


def normed(
    power: float = 2.0, axis: int = -1, dtype: ir.DataType = ir.DataType.FLOAT
) -> Callable[[list[ir.Node], ir.Value, ir.Value], ir.Value]:
    def make(g: list[ir.Node], x: ir.Value, _: ir.Value) -> ir.Value:
        mean = node(g, "ReduceMean", node(g, "Pow", x, constant(power)), constant([axis]), keepdims=1)
        root = node(g, "Reciprocal", node(g, "Sqrt", node(g, "Add", mean, constant(1e-5))))
        y = node(g, "Mul", x, root)
        return y if dtype == ir.DataType.FLOAT else cast(g, y, dtype)

    return make


def turned(
    cut: int | None, heads: int = 2, swapped: bool = False
) -> Callable[[list[ir.Node], ir.Value, ir.Value], ir.Value]:
    """Of [M, 2, W]: all columns; or number ``cut`` of two parts, 4 columns, the other 5."""

    def make(g: list[ir.Node], x: ir.Value, angles: ir.Value) -> ir.Value:
        parts = [x]
        if cut is not None:
            widths = [4, 5] if cut == 0 else [5, 4]
            g.append(ir.node("Split", [x, constant(widths)], {"axis": -1}, num_outputs=2))
            parts = list(g[-1].outputs)
            for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
                part.name, part.dtype, part.shape = f"part{i}", x.dtype, ir.Shape(["M", 2, width])
        flat = node(g, "Reshape", parts[cut or 0], constant([1, -1, 8]))
        y = node(g, "RotaryEmbedding", flat, angles, angles, interleaved=1, num_heads=heads)
        y = node(g, "Reshape", y, constant([-1, 2, 4]))
        y.shape = ir.Shape(["M", 2, 4])
        if cut is None:
            return y
        parts[cut] = y
        return node(g, "Concat", *(reversed(parts) if swapped else parts), axis=-1)

    return make


def constant(value: float | list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(value, np.int64 if isinstance(value, list) else np.float32), name="constant")
    return ir.Value(name="constant", const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))


def node(g: list[ir.Node], op: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
    g.append(ir.node(op, list(inputs), attributes))
    y = g[-1].outputs[0]
    y.name, y.shape, y.dtype = f"{op}{len(g)}", inputs[0].shape, inputs[0].dtype
    return y


def cast(g: list[ir.Node], x: ir.Value, dtype: ir.DataType) -> ir.Value:
    y = node(g, "Cast", x, to=int(dtype))
    y.dtype = dtype
    return y


def fused(
    make: Callable[[list[ir.Node], ir.Value, ir.Value], ir.Value],
    dtype: ir.DataType,
    other: Sequence[int | str] = ("M", 8),
    how: Callable[[ir.Model], bool] = fuse_pointwise,
    shape: Sequence[int | str] = ("M", 8),
) -> list[str]:
    """Types of nodes that are left of a graph of two inputs."""
    a, b = (ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(dtype)) for n, s in (("a", shape), ("b", other)))
    nodes: list[ir.Node] = []
    y = make(nodes, a, b)
    graph = ir.Graph([a, b], [y], nodes=nodes, opset_imports={"": OPSET, "v4": VERSION}, name="one")
    before = [one.op_type for one in nodes]
    changed = how(ir.Model(graph, ir_version=IR_VERSION))
    after = [one.op_type for one in graph]
    assert changed == (before != after) and graph.outputs[0].dtype == y.dtype
    return after
