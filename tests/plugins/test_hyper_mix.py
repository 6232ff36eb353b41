from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from one_node import count, one_node, run, to_torch

from v4export.plugins.hyper_mix.op import hyper_mix


def operands(M: int, X: int, D: int, dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng([M, X, D])
    wide = [rng.normal(size=shape).astype(np.float32) for shape in ((M, X, D), (M, D), (M, X), (M, X, X))]
    return [a.astype(dtype) for a in wide[:2]] + wide[2:]


def by_hand(streams, y, post, comb):
    streams, y, post, comb = (a.astype(np.float64) for a in (streams, y, post, comb))
    return post[..., None] * y[:, None] + sum(comb[:, j, :, None] * streams[:, j, None] for j in range(comb.shape[1]))


def node_model(inputs):
    model = one_node("HyperMix", inputs, width=inputs[0].shape[-1])
    return model


@pytest.mark.parametrize("X", [1, 2, 3, 4])
@pytest.mark.parametrize("M", [1, 9])
def test_equation(M, X):
    inputs = operands(M, X, 24)
    wanted = by_hand(*inputs)
    for got in (hyper_mix(*map(torch.from_numpy, inputs)).numpy(), run(node_model(inputs), inputs)[0]):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow(dtype):
    inputs = operands(5, 4, 32, dtype)
    got, eager = run(node_model(inputs), inputs)[0], hyper_mix(*map(to_torch, inputs)).float().numpy()
    assert (got.astype(dtype) == got).all()
    np.testing.assert_allclose(got, eager, rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-6)


def test_registration():
    torch.library.opcheck(hyper_mix, (*map(torch.from_numpy, operands(3, 4, 8)),))


def test_body_is_small():
    assert count(node_model(operands(1, 4, 8)), "HyperMix") < 12


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(tmp_path):
    dims = [("M", 4, 64), ("M", 64), ("M", 4), ("M", 4, 4)]
    builds(node_model(operands(3, 4, 64, ml_dtypes.bfloat16)), dims, {"M": (1, 8, 64)}, tmp_path)
