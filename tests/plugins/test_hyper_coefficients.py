from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from one_node import count, one_node, run, to_torch
from test_hyper_connection import EPS, NORM_EPS, coefficients_by_hand, operands

from v4export.plugins.hyper_coefficients.op import hyper_coefficients
from v4export.plugins.hyper_connection.op import hyper_connection

OP = "HyperCoefficients"


def node_model(inputs, iterations):
    streams, *weights = inputs
    attributes = dict(num_streams=streams.shape[1], iterations=iterations, eps=EPS, norm_eps=NORM_EPS)
    return one_node(OP, [streams], weights, outputs=3, **attributes)


def eager(inputs, iterations):
    return [t.numpy() for t in hyper_coefficients(*map(to_torch, inputs), iterations, EPS, NORM_EPS)]


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("X", [1, 2, 4])
def test_equation(X, iterations):
    for M, spread in ((1, 1.0), (9, 4.0)):
        inputs = operands(M, X, 24, spread=spread)
        wanted = coefficients_by_hand(inputs, iterations)
        for way in (eager(inputs, iterations), run(node_model(inputs, iterations), inputs[:1])):
            for got, value in zip(way, wanted, strict=True):
                assert got.dtype == np.float32 and got.shape == value.shape
                np.testing.assert_allclose(got, value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nothing_is_rounded(dtype):
    inputs = operands(5, 4, 32, dtype)
    for got, value in zip(run(node_model(inputs, 20), inputs[:1]), eager(inputs, 20), strict=True):
        np.testing.assert_allclose(got, value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_they_are_those_of_hyper_connection(dtype):
    inputs = [to_torch(a) for a in operands(5, 4, 32, dtype)]
    pre, *rest = hyper_coefficients(*inputs, 20, EPS, NORM_EPS)
    z, *wanted = hyper_connection(*inputs, 20, EPS, NORM_EPS)
    for one, two in zip([(pre[..., None] * inputs[0].float()).sum(1).to(z.dtype), *rest], [z, *wanted], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_registration():
    torch.library.opcheck(hyper_coefficients, (*map(torch.from_numpy, operands(3, 4, 8)), 3, EPS, NORM_EPS))


def test_body_is_that_of_hyper_connection_without_the_collapse():
    assert [count(node_model(operands(1, 4, 8), n), OP) for n in (1, 20)] == [34, 110]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_rtx_builds_it(dtype, tmp_path):
    builds(node_model(operands(3, 4, 64, dtype), 20), [("M", 4, 64)], {"M": (1, 8, 64)}, tmp_path)
