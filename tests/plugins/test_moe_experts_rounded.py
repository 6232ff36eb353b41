"""Experts that round what they multiply to FP8, against a literal NumPy version."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from one_node import one_node, run, to_torch
from onnx_ir.passes import common
from test_moe_experts import Operands, arguments, operands

from v4export.graphs.passes.group_experts import group_experts
from v4export.graphs.passes.plugin_kernels import arguments as node_arguments
from v4export.graphs.passes.plugin_kernels import plugin_kernels
from v4export.graphs.passes.widen import widen
from v4export.plugins.kernels.call import call
from v4export.plugins.kernels.kernel import Unfit
from v4export.plugins.moe_experts.kernel import kernels
from v4export.plugins.moe_experts.op import moe_experts

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SHAPES = {"a few": (7, 5, 2, 32, 16), "one expert": (3, 1, 1, 16, 16), "one token": (1, 4, 2, 16, 32)}


def subject(shape: str, dtype: type = np.float32) -> tuple[Operands, np.ndarray, np.ndarray]:
    """FP8 experts with a multiplier a row, and scales of what gates and downs multiply, some of which cut off."""
    M, E, K, D, F = SHAPES[shape]
    o = operands(M, E, K, D, F, block=(1, 128), seed=3)
    o = replace(o, x=o.x.astype(dtype))
    rng = np.random.default_rng(E)
    scales = [np.exp(rng.uniform(-8, -5, E)).astype(np.float32) for _ in range(2)]
    return o, *scales


def fp8(x: np.ndarray, scale: np.float32) -> np.ndarray:
    return np.clip(x.astype(np.float32) / scale, -448, 448).astype(FP8).astype(np.float32) * scale


def by_hand(o: Operands, input_scale: np.ndarray, middle_scale: np.ndarray) -> np.ndarray:
    """A token and an expert at a time; numbers are rounded to FP8 where a GPU's FP8 products would have them so."""
    dtype = o.x.dtype

    def matrix(part: int, e: int) -> np.ndarray:
        wide = o.parts[part][e].astype(np.float32) * o.scales[part][e]
        return wide.astype(dtype).astype(np.float64)

    def stored(y: np.ndarray) -> np.ndarray:
        return y.astype(np.float32).astype(dtype).astype(np.float32)

    y = np.zeros(o.x.shape)
    for m, token in enumerate(o.x):
        for k, e in enumerate(o.indices[m]):
            x = stored(fp8(token, input_scale[e]))
            gate, up = stored(matrix(0, e) @ x), stored(matrix(1, e) @ x)
            h = stored(gate / (1 + np.exp(-gate)) * up)
            y[m] += float(o.weights[m, k]) * stored(matrix(2, e) @ stored(fp8(h, middle_scale[e])))
    return y


def eager(o: Operands, *scales: np.ndarray) -> np.ndarray:
    return moe_experts(*arguments(o), *map(torch.from_numpy, scales)).float().numpy()


def node_model(o: Operands, *scales: np.ndarray) -> ir.Model:
    return one_node(
        "MoeExperts", [o.x, o.weights, o.indices], [*o.flat, *scales], width=o.x.shape[1], num_experts=len(o.parts[0]),
        rows=o.block[0], columns=o.block[1], format="fp8-row", limit=0.0,
    )  # fmt: skip


def body(o: Operands, *scales: np.ndarray) -> np.ndarray:
    model = node_model(o, *scales)
    common.InlinePass()(model)
    if o.x.dtype == BF16:
        common.ShapeInferencePass()(model)
        widen(model)
    return run(model, [o.x, o.weights, o.indices])[0]


def lowered(o: Operands, *scales: np.ndarray) -> np.ndarray:
    """An expert at a time in a loop."""
    model = node_model(o, *scales)
    assert group_experts(model)
    if o.x.dtype == BF16:
        common.ShapeInferencePass()(model)
        widen(model)
    return run(model, [o.x, o.weights, o.indices])[0]


#: A number that a sum in another order pushes over a boundary of E4M3 moves by a spacing; few do.
def assert_near(found: np.ndarray, wanted: np.ndarray, flipped: float) -> None:
    error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert np.median(error) < flipped, error


@pytest.mark.parametrize("compute", [eager, body, lowered])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(compute, shape):
    o, *scales = subject(shape)
    wanted = by_hand(o, *scales)
    assert_near(compute(o, *scales), wanted, 2e-3)
    # Scales of another expert, or none, would be seen.
    without = moe_experts(*arguments(o)).numpy()
    assert (np.linalg.norm(without - wanted, axis=1) > 5e-3 * np.linalg.norm(wanted, axis=1)).all()


@pytest.mark.parametrize("compute", [eager, body, lowered])
def test_bfloat16(compute):
    o, *scales = subject("a few", BF16)
    assert_near(compute(o, *scales), by_hand(o, *scales), 2e-2)


@pytest.mark.parametrize("compute", [body, lowered])
def test_the_op_itself(compute):
    """The forms agree far better than any agrees with a rounding left out."""
    o, *scales = subject("a few")
    wanted = eager(o, *scales)
    assert_near(compute(o, *scales), wanted, 1e-5)
    for which in (0, 1):
        other = [s * np.float32(1.5) if i == which else s for i, s in enumerate(scales)]
        assert np.abs(compute(o, *other) - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_kernels_do_not_fit():
    o, *scales = subject("a few")
    with pytest.raises(Unfit, match="rounds what experts multiply"):
        kernels(call, *arguments(o)[:-4], "fp8-row", 1, 0, None, *map(to_torch, scales))
    model = node_model(o, *scales)
    assert plugin_kernels(model) == {"MoeExperts": "no kernel rounds what experts multiply to FP8"}
    assert any(node.op_type == "MoeExperts" for node in model.graph)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 2])
def test_a_nodes_arguments(shape, count):
    o, *scales = subject(shape)
    (node,) = [n for n in node_model(o, *scales[:count]).graph if n.op_type == "MoeExperts"]
    found, experts = node_arguments(node), len(o.parts[0])
    assert [len(a) for a in found[3:12]] == [experts] * 6 + [0] * 3 and found[12] == "fp8-row"
    assert [v.name if v else None for v in found[-2:]] == (
        [f"w{6 * experts}", f"w{6 * experts + 1}"] if count else [None] * 2
    )
