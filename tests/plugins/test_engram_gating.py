from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import check_narrow
from one_node import count, one_node, run, to_torch

from v4export.plugins.engram_gating.op import engram_gating

OP, EPS = "EngramGating", 1e-5


def operands(M, X, D, seed=0):
    """Streams, keys, value, and the weights of both norms."""
    rng = np.random.default_rng([seed, M, X, D])
    shapes = (M, X, D), (M, X, D), (M, D), (X, D), (X, D)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_hand(inputs, eps):
    """From the equations, in double precision."""
    h, k, value, q_weight, k_weight = (a.astype(np.float64) for a in inputs)
    h, k = (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) for x in (h, k))
    g = (h * q_weight * k * k_weight).sum(-1) / np.sqrt(h.shape[-1])
    s = np.where(g < 0, -1, 1) * np.sqrt(np.maximum(np.abs(g), 1e-6))
    return value[:, None] / (1 + np.exp(-s))[..., None]


def body(inputs, eps=EPS):
    return run(one_node(OP, inputs, eps=eps), inputs)[0]


def eager(inputs, eps=EPS):
    return engram_gating(*map(to_torch, inputs), eps).float().numpy()


def compare(inputs, eps=EPS):
    wanted = by_hand(inputs, eps)
    for way in (eager, body):
        # A root magnifies what rounding did to a sum near zero.
        np.testing.assert_allclose(way(inputs, eps), wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(body(inputs, eps), eager(inputs, eps), rtol=0, atol=2e-5)


@pytest.mark.parametrize("X", [1, 4])
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("D", [1, 24, 700])
def test_equation(M, X, D):
    for seed in range(3):
        compare(operands(M, X, D, seed))


@pytest.mark.parametrize("eps", [1e-20, 1e-6])
def test_an_eps_next_to_nothing(eps):
    """Small keys are normed, and zeros too, which stay zero and fit as little as anything can."""
    h, k, *rest = operands(4, 2, 32)
    k[:2] *= 1e-8
    k[0, 0] = h[1] = 0
    compare([h, k, *rest], eps)
    assert np.abs(body([h, k, *rest], eps)[1] - rest[0][1] / 2).max() < 1e-3


def test_large_streams_do_not_overflow():
    h, k, *rest = operands(4, 2, 32)
    compare([h * 1e8, k * 1e8, *rest])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("keep", [[], [3, 4]])
def test_narrow(dtype, keep):
    """Whether the norms' weights are float32 or not."""
    check_narrow(engram_gating, OP, operands(5, 4, 32), dtype, keep=keep, eps=1e-20)


def test_registration():
    torch.library.opcheck(engram_gating, (*map(torch.from_numpy, operands(3, 4, 8)), EPS))


def test_body_is_small():
    assert count(one_node(OP, operands(1, 4, 8), eps=EPS), OP) == 30


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, tmp_path):
    arrays = [a.astype(dtype) for a in operands(1, 4, 512)]
    dims = [["M", 4, 512], ["M", 4, 512], ["M", 512], [4, 512], [4, 512]]
    builds(one_node(OP, arrays, eps=1e-20), dims, {"M": (1, 64, 1024)}, tmp_path)
