from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_of import builds
from one_node import count, one_node, run

from v4export.plugins.hash_route.op import hash_route

M, E, K, V = 7, 9, 3, 11


def operands(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [M, E], a table [V, K] that names no expert twice, and ids [M]."""
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(E)[:K] for _ in range(V)])
    return rng.normal(size=(M, E)).astype(np.float32) * 4, table, rng.integers(0, V, M)


def by_hand(logits, table, ids, scoring, norm, scale):
    wide = logits.astype(np.float64)
    if scoring == "softmax":
        scores = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-wide)) if scoring == "sigmoid" else np.sqrt(np.log1p(np.exp(wide)))
    indices = table[ids]
    weights = np.take_along_axis(scores, indices, -1)
    return (weights / weights.sum(-1, keepdims=True) if norm else weights) * scale, indices


def node_model(inputs, scoring, norm, scale):
    return one_node("HashRoute", inputs, outputs=2, scoring=scoring, norm=int(norm), scale=scale)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_equation(scoring, norm):
    inputs = operands()
    wanted, indices = by_hand(*inputs, scoring, norm, 1.5)
    eager = [t.numpy() for t in hash_route(*map(torch.from_numpy, inputs), scoring, norm, 1.5)]
    for got_weights, got_indices in (eager, run(node_model(inputs, scoring, norm, 1.5), inputs)):
        assert got_weights.dtype == np.float32
        np.testing.assert_array_equal(got_indices, indices)
        np.testing.assert_allclose(got_weights, wanted, rtol=1e-5)


def test_registration():
    torch.library.opcheck(hash_route, (*map(torch.from_numpy, operands()), "sqrtsoftplus", True, 1.5))


def test_body_is_small():
    assert count(node_model(operands(), "sqrtsoftplus", True, 1.5), "HashRoute") < 25


@pytest.mark.slow
def test_tensorrt_rtx_builds_it(tmp_path):
    model = node_model(operands(), "sqrtsoftplus", True, 1.5)
    builds(model, [("M", E), (V, K), ("M",)], {"M": (1, 8, 64)}, tmp_path)
