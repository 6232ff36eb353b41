"""Pointwise kernels for a CPU beside PyTorch, and what the pass that asks for them takes and leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from kernel_checks import needs_compiler

from v4export.graphs.passes.pointwise import fuse_pointwise, fuse_rounding
from v4export.graphs.stamp import IR_VERSION
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
        ("SwiGlu", (a, b)): lambda gate, up: torch.nn.functional.silu(gate.double()) * up,
        ("RmsNorm", (a, weight)): lambda x, w: torch.nn.functional.rms_norm(x.double(), x.shape[-1:], w.double(), 1e-3),
    }
    for (op, inputs), wanted in exact.items():
        got = run(op, inputs, {"activations": activations, "epsilon": 1e-3}, target)
        # A rounding, which the last place of what is rounded may turn the other way.
        steps = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        assert torch.allclose(got.double(), wanted(*inputs).double(), rtol=1.01 * steps, atol=1e-7), op
        assert torch.equal(got, got.to(dtype).float()), op


@pytest.mark.parametrize("op", ["Sum", "SwiGlu"])
def test_inputs_of_two_shapes_are_an_error(op: str) -> None:
    with pytest.raises(Exception, match=f"{op}: inputs of two shapes"):
        run(op, (torch.zeros(2, 3), torch.zeros(1, 3)), {"activations": ""}, HERE[0])


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


def node(g: list[ir.Node], op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
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
) -> list[str]:
    """Types of nodes that are left of a graph of two inputs, the first [M, 8]."""
    a, b = (ir.Value(name=n, shape=ir.Shape(s), type=ir.TensorType(dtype)) for n, s in (("a", ("M", 8)), ("b", other)))
    nodes: list[ir.Node] = []
    y = make(nodes, a, b)
    graph = ir.Graph([a, b], [y], nodes=nodes, opset_imports={"": OPSET, "v4": VERSION}, name="one")
    before = [one.op_type for one in nodes]
    changed = how(ir.Model(graph, ir_version=IR_VERSION))
    after = [one.op_type for one in graph]
    assert changed == (before != after) and graph.outputs[0].dtype == y.dtype
    return after


def run(
    op: str, inputs: Sequence[torch.Tensor], attributes: dict[str, str | float], target: cpu.Target
) -> torch.Tensor:
    """By a node alone."""
    values = [
        ir.Value(name=f"x{i}", shape=ir.Shape(x.shape), type=ir.TensorType(ir.DataType.FLOAT))
        for i, x in enumerate(inputs)
    ]
    one = ir.node(op, values, attributes, domain="v4")
    y = one.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(inputs[0].shape)
    graph = ir.Graph(values, [y], nodes=[one], opset_imports={"": OPSET, "v4": VERSION}, name="one")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    options.register_custom_ops_library(str(cpu.library(target)))
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {f"x{i}": x.numpy() for i, x in enumerate(inputs)})[0])
