from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import count, one_node, run, to_torch
from onnx_ir.passes import common

from v4export.graphs.passes.group_experts import group_experts
from v4export.graphs.passes.unpack_fp4 import unpack_fp4
from v4export.graphs.passes.widen import widen
from v4export.plugins.moe_experts.op import moe_experts

FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
FP4_BLOCK = 32
E2M1 = (1, FP4_BLOCK)


@dataclass(frozen=True)
class Operands:
    x: np.ndarray  # [M, D]
    weights: np.ndarray  # [M, K]
    indices: np.ndarray  # [M, K]
    parts: list[list[np.ndarray]]  # gates, ups, downs
    scales: list[list[np.ndarray]]
    block: tuple[int, int]
    limit: float | None = None

    @property
    def format(self) -> str:
        return {FP8: "fp8", FP4: "mxfp4"}.get(self.parts[0][0].dtype.type, "")

    @property
    def flat(self) -> list[np.ndarray]:
        """Matrices and multipliers in the node's order, each [1, ...] as the stamper declares them."""
        return [w[None] for part in (*self.parts, *self.scales) for w in part]


def operands(M, E, K, D, F, *, block=None, dtype=np.float32, seed=0, idle=(), limit=None) -> Operands:
    """Random experts; those in ``idle`` are chosen by nobody. Block ``E2M1`` means packed FP4, another one FP8."""
    rng = np.random.default_rng([seed, M, E, K, D, F])
    busy = [e for e in range(E) if e not in idle]
    indices = np.array([rng.choice(busy, K, replace=False) for _ in range(M)], np.int64)
    shapes = ((F, D), (F, D), (D, F))
    parts = [[rng.normal(size=s).astype(np.float32) / s[1] ** 0.5 for _ in range(E)] for s in shapes]
    scales: list[list[np.ndarray]] = []
    if block == E2M1:
        parts = [[(w * 3 * s[1] ** 0.5).astype(FP4) for w in part] for part, s in zip(parts, shapes, strict=True)]
        scales = [
            [np.ldexp(1.0, rng.integers(-6, -1, (n, k // FP4_BLOCK))).astype(ml_dtypes.bfloat16) for _ in range(E)]
            for n, k in shapes
        ]
    elif block:
        parts = [[(w * 200).astype(FP8) for w in part] for part in parts]
        grid = [(-(-n // block[0]), -(-k // block[1])) for n, k in shapes]
        scales = [[(np.exp(rng.normal(size=g)) / 200).astype(np.float32) for _ in range(E)] for g in grid]
    else:
        parts = [[w.astype(dtype) for w in part] for part in parts]
    x = rng.normal(size=(M, D)).astype(np.float32).astype(dtype)
    return Operands(x, rng.random((M, K)).astype(np.float32), indices, parts, scales, block or (128, 128), limit)


def by_hand(o: Operands) -> np.ndarray:
    """Each token through each of its experts, in double precision, from the equation."""

    def matrix(part: int, e: int) -> np.ndarray:
        w = o.parts[part][e].astype(np.float64)
        if o.scales:
            for n in range(w.shape[0]):
                for k in range(0, w.shape[1], o.block[1]):
                    w[n, k : k + o.block[1]] *= float(o.scales[part][e][n // o.block[0], k // o.block[1]])
        return w

    y = np.zeros(o.x.shape)
    for m, x in enumerate(o.x.astype(np.float64)):
        for k, e in enumerate(o.indices[m]):
            gate, up = matrix(0, e) @ x, matrix(1, e) @ x
            if o.limit is not None:
                gate, up = np.minimum(gate, o.limit), np.clip(up, -o.limit, o.limit)
            y[m] += float(o.weights[m, k]) * (matrix(2, e) @ (gate / (1 + np.exp(-gate)) * up))
    return y


def stored(w: np.ndarray) -> torch.Tensor:
    """As PyTorch holds it: two numbers of E2M1 a byte, the even column in the low bits."""
    if w.dtype != FP4:
        return to_torch(w)
    nibbles = w.view(np.uint8) & 15
    return to_torch(nibbles[:, ::2] | nibbles[:, 1::2] << 4)


def arguments(o: Operands) -> list:
    parts = [[stored(w) for w in part] for part in (*o.parts, *(o.scales or [[], [], []]))]
    return [*map(to_torch, (o.x, o.weights, o.indices)), *parts, [], [], [], o.format, *o.block, o.limit]


def eager(o: Operands) -> np.ndarray:
    y = moe_experts(*arguments(o))
    assert y.dtype == to_torch(o.x).dtype
    return y.float().numpy()


def node_model(o: Operands):
    return one_node(
        "MoeExperts", [o.x, o.weights, o.indices], o.flat, width=o.x.shape[1], num_experts=len(o.parts[0]),
        rows=o.block[0], columns=o.block[1], format=o.format, limit=o.limit or 0.0,
    )  # fmt: skip


def body(o: Operands) -> np.ndarray:
    model = node_model(o)
    if o.scales:
        # onnxruntime's schema of a function leaves FP8 out for an operand that only a nested function reads.
        common.InlinePass()(model)
        unpack_fp4(model)
    return run(model, [o.x, o.weights, o.indices])[0]


def lowered(o: Operands) -> np.ndarray:
    """As ``graphs/lower.py`` does it: a Gemm an expert, and 16 bits carried in float32."""
    model = node_model(o)
    for value in model.graph.initializers.values():
        # The pass re-declares references into files; in-memory matrices are given to it as it leaves those.
        if value.shape.rank() == 3 and not o.scales:
            array = value.const_value.numpy()[0]
            value.const_value = type(value.const_value)(array, name=value.name)
            value.shape = value.const_value.shape
    assert group_experts(model)
    assert not any(n.op_type == "MoeExperts" for n in model.graph)
    if o.x.dtype != np.float32:
        common.InlinePass()(model)
        common.ShapeInferencePass()(model)
        widen(model)
    return run(model, [o.x, o.weights, o.indices])[0]


def check(o: Operands) -> None:
    wanted = by_hand(o)
    limit = 1e-5 * max(1, np.abs(wanted).max())
    for way in (eager, body, lowered):
        got = way(o)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=limit, err_msg=way.__name__)


# M, E, K, D, F
PLAIN = {
    "one token, one expert": (1, 1, 1, 6, 4),
    "one token": (1, 8, 3, 16, 10),
    "five tokens": (5, 9, 4, 16, 10),
    "every expert chosen by each": (5, 4, 4, 8, 6),
    "more tokens than experts": (17, 6, 2, 16, 10),
    "many tokens": (33, 9, 4, 16, 10),
    "many tokens, one expert": (33, 1, 1, 7, 5),
}


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_equation(case):
    check(operands(*case))


@pytest.mark.parametrize("M", [1, 5, 33])
def test_an_expert_that_nobody_chose(M):
    check(operands(M, 6, 2, 8, 6, idle=(0, 3, 5)))


@pytest.mark.parametrize("M", [3, 20])
def test_all_tokens_on_one_expert(M):
    check(operands(M, 5, 1, 8, 6, idle=(0, 1, 3, 4)))


@pytest.mark.parametrize("M", [4, 20])
def test_one_expert_twice(M):
    """A forced choice may name an expert twice; it counts twice."""
    o = operands(M, 4, 3, 8, 6)
    o.indices[:, 1] = o.indices[:, 0]
    check(o)


@pytest.mark.parametrize("M", [2, 20])
def test_weight_of_zero(M):
    o = operands(M, 4, 2, 8, 6)
    o.weights[:, 1] = 0
    check(o)


# M, E, K, D, F, block
SCALED = {
    "inside one block": (3, 4, 2, 48, 24, (128, 128)),
    "ragged": (3, 3, 2, 160, 136, (128, 128)),
    "ragged, many tokens": (20, 3, 2, 160, 136, (128, 128)),
    "several blocks": (2, 2, 1, 256, 300, (128, 128)),
    "small blocks": (17, 5, 2, 10, 7, (4, 3)),
}


@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED)
def test_fp8(case):
    *sizes, block = case
    check(operands(*sizes, block=block))


# M, E, K, D, F
PACKED = {
    "one token": (1, 8, 3, 64, 32),
    "one expert": (3, 1, 1, 32, 32),
    "five tokens": (5, 9, 4, 96, 64),
    "many tokens": (33, 6, 2, 64, 160),
}


@pytest.mark.parametrize("limit", [None, 0.75])
@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_fp4(case, limit):
    check(operands(*case, block=E2M1, limit=limit))


@pytest.mark.parametrize("block", [None, (8, 8), E2M1], ids=["plain", "fp8", "fp4"])
def test_limit(block):
    """Gates have no lower limit."""
    o = operands(9, 4, 2, 32, 32, block=block, limit=0.1)
    check(o)
    assert np.abs(by_hand(o) - by_hand(replace(o, limit=None))).max() > 0.1


@st.composite
def mixtures(draw):
    E = draw(st.integers(1, 9))
    K, M = draw(st.integers(1, E)), draw(st.sampled_from([1, 5, 16, 17, 33]))
    D, F = draw(st.integers(2, 20)), draw(st.integers(2, 20))
    block = draw(st.sampled_from([None, (8, 8), (3, 128)]))
    return operands(M, E, K, D, F, block=block, seed=draw(st.integers(0, 99)))


@given(mixtures())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_mixture(o):
    check(o)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block", [None, (8, 8), E2M1], ids=["plain", "fp8", "fp4"])
@pytest.mark.parametrize("M", [5, 20])
def test_narrow(M, block, dtype):
    """16-bit tokens: the lowered graph rounds where the eager reference does, so most numbers agree to the bit."""
    o = operands(M, 5, 2, *((64, 32) if block == E2M1 else (24, 16)), block=block, dtype=dtype)
    one, two = eager(o), lowered(o)
    assert (two.astype(dtype) == two).all()
    eps = float(ml_dtypes.finfo(dtype).eps)
    scale = np.abs(one).max()
    np.testing.assert_allclose(one, by_hand(o), rtol=0, atol=6 * eps * scale)
    np.testing.assert_allclose(two, one, rtol=0, atol=4 * eps * scale)
    assert (one == two).mean() > 0.8


@pytest.mark.parametrize("block", [None, (8, 8), E2M1], ids=["plain", "fp8", "fp4"])
def test_bfloat16_body(block):
    """The body itself, carried in float32 because onnxruntime has no bfloat16 products on a CPU."""
    o = operands(5, 5, 2, *((64, 32) if block == E2M1 else (24, 16)), block=block, dtype=ml_dtypes.bfloat16)
    model = node_model(o)
    common.InlinePass()(model)
    unpack_fp4(model)
    common.ShapeInferencePass()(model)
    widen(model)
    two, one = run(model, [o.x, o.weights, o.indices])[0], eager(o)
    assert (two.astype(ml_dtypes.bfloat16) == two).all()
    np.testing.assert_allclose(two, one, rtol=0, atol=2.0**-6 * np.abs(one).max())
    assert (one == two).mean() > 0.8


@pytest.mark.parametrize("M", [5, 20])
def test_float16_body(M):
    """onnxruntime has float16 on a CPU, so the body runs as it stands."""
    o = operands(M, 5, 2, 24, 16, dtype=np.float16)
    one = eager(o)
    np.testing.assert_allclose(body(o), one, rtol=0, atol=3e-3 * np.abs(one).max())


@pytest.mark.parametrize("block", [None, (8, 8), E2M1], ids=["plain", "fp8", "fp4"])
def test_registration(block):
    o = operands(5, 3, 2, *((64, 32) if block == E2M1 else (16, 10)), block=block, limit=2.0)
    utils = ("test_autograd_registration", "test_faketensor", *(() if block else ("test_schema",)))
    torch.library.opcheck(moe_experts, (*arguments(o),), test_utils=utils)


def test_body_does_not_grow_with_experts():
    sizes = {E: count(node_model(operands(1, E, 1, 4, 4)), "MoeExperts") for E in (1, 8, 64)}
    assert len(set(sizes.values())) == 1 and sizes[1] < 90


def test_fp8_body_grows_by_the_widening_alone():
    models = {E: node_model(operands(1, E, 1, 4, 4, block=(2, 2))) for E in (1, 8, 64)}
    rest = {E: count(m, "MoeExperts", lambda n: n.op_type != "TRT_BlockDequantize") for E, m in models.items()}
    widening = {E: count(m, "MoeExperts", lambda n: n.op_type == "TRT_BlockDequantize") for E, m in models.items()}
    assert widening == {E: 3 * E for E in models}
    assert len(set(rest.values())) == 1


def engine_model(block, dtype):
    o = operands(4, 4, 2, 128, 128, block=block, dtype=dtype, limit=10.0)
    return node_model(o), (("M", 128), ("M", 2), ("M", 2)), {"M": (1, 4, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda d: np.dtype(d).name)
def test_tensorrt_rtx_builds_fp4(tmp_path, dtype):
    builds(*engine_model(E2M1, dtype), tmp_path, target="sm120")


@pytest.mark.slow
def test_ada_has_no_fp4(tmp_path):
    with pytest.raises(AssertionError, match="fp4_e2m1"):
        builds(*engine_model(E2M1, ml_dtypes.bfloat16), tmp_path, target="sm89")


@pytest.mark.slow
def test_tensorrt_rtx_builds_a_limit(tmp_path):
    builds(*engine_model(None, ml_dtypes.bfloat16), tmp_path)
