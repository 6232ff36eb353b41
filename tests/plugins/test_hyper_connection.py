from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from one_node import count, one_node, run, to_torch

from v4export.plugins.hyper_connection.op import hyper_connection

EPS, NORM_EPS = 1e-6, 1e-5


def operands(M: int, X: int, D: int, dtype=np.float32, spread: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    """Streams [M, X, D], fn, base and scale; ``spread`` of the logits that Sinkhorn's iterations start from."""
    rng = np.random.default_rng([seed, M, X, D])
    rows = (2 + X) * X
    return [
        rng.normal(size=(M, X, D)).astype(np.float32).astype(dtype),
        (rng.normal(size=(rows, X * D)) / (X * D) ** 0.5).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        np.array([0.5, 1.5, spread], np.float32),
    ]


def node_model(inputs, iterations):
    streams, *weights = inputs
    return one_node(
        "HyperConnection", [streams], weights, outputs=3, num_streams=streams.shape[1], iterations=iterations,
        eps=EPS, norm_eps=NORM_EPS,
    )  # fmt: skip


def coefficients_by_hand(inputs, iterations):
    """From the equations, in double precision."""
    streams, fn, base, (s0, s1, s2) = (a.astype(np.float64) for a in inputs)
    M, X, _ = streams.shape
    u = streams.reshape(M, -1)
    m = (u / np.sqrt((u * u).mean(-1, keepdims=True) + NORM_EPS)) @ fn.T
    pre = 1 / (1 + np.exp(-(m[:, :X] * s0 + base[:X]))) + EPS
    post = 2 / (1 + np.exp(-(m[:, X : 2 * X] * s1 + base[X : 2 * X])))
    e = np.exp(m[:, 2 * X :] * s2 + base[2 * X :]).reshape(M, X, X)
    c = e / e.sum(2, keepdims=True) + EPS
    c /= c.sum(1, keepdims=True) + EPS
    for _ in range(iterations - 1):
        c /= c.sum(2, keepdims=True) + EPS
        c /= c.sum(1, keepdims=True) + EPS
    return pre, post, c


def by_hand(inputs, iterations):
    pre, post, c = coefficients_by_hand(inputs, iterations)
    return (pre[..., None] * inputs[0].astype(np.float64)).sum(1), post, c


def eager(inputs, iterations):
    results = hyper_connection(*map(to_torch, inputs), iterations, EPS, NORM_EPS)
    assert results[0].dtype == to_torch(inputs[0]).dtype
    return [t.float().numpy() for t in results]


@pytest.mark.parametrize("iterations", [1, 2, 7, 20])
@pytest.mark.parametrize("X", [1, 2, 3, 4])
def test_equation(X, iterations):
    for M, spread in ((1, 1.0), (9, 4.0)):
        inputs = operands(M, X, 24, spread=spread)
        wanted = by_hand(inputs, iterations)
        for way in (eager(inputs, iterations), run(node_model(inputs, iterations), inputs[:1])):
            for got, value in zip(way, wanted, strict=True):
                np.testing.assert_allclose(got, value, rtol=0, atol=2e-6 * max(1, np.abs(value).max()))


@pytest.mark.parametrize("X", [2, 4])
def test_sums_of_rows_and_columns(X):
    (_, _, comb) = run(node_model(operands(5, X, 16), 20), operands(5, X, 16)[:1])
    np.testing.assert_allclose(comb.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(comb.sum(2), 1, atol=1e-3)


def test_body_against_the_reference():
    """Closer than the equation in double precision tells: the same float32 steps."""
    inputs = operands(33, 4, 64)
    for one, two in zip(eager(inputs, 20), run(node_model(inputs, 20), inputs[:1]), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6 * max(1, np.abs(one).max()))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow(dtype):
    """Only the collapsed stream is rounded."""
    inputs = operands(5, 4, 32, dtype)
    z, *rest = run(node_model(inputs, 20), inputs[:1])
    wanted_z, *wanted = eager(inputs, 20)
    assert (z.astype(dtype) == z).all()
    np.testing.assert_allclose(z, wanted_z, rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-6)
    for got, value in zip(rest, wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-6)


def test_registration():
    torch.library.opcheck(hyper_connection, (*map(torch.from_numpy, operands(3, 4, 8)), 3, EPS, NORM_EPS))


def test_body_grows_by_two_nodes_for_half_an_iteration():
    sizes = [count(node_model(operands(1, 4, 8), n), "HyperConnection") for n in (1, 2, 20)]
    assert np.diff(sizes).tolist() == [4, 72] and sizes[0] < 45


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(tmp_path):
    builds(node_model(operands(3, 4, 64, ml_dtypes.bfloat16), 20), [("M", 4, 64)], {"M": (1, 8, 64)}, tmp_path)
