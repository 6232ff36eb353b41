from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, body, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import one_node, run, to_torch

from v4export.plugins.compress_tokens.op import compress_tokens

OP = "CompressTokens"


def operands(S, ratio, halves, position, W=3, seed=0):
    past = Past.of(position, S, seed)
    rows = past.rows(2 * halves * W)
    ring = past.ring(rows, halves * ratio)
    return past, rows, [past.new(rows), ring, past.normal(ratio, halves * W), past.position]


def by_hand(rows, bias, entry, ratio, halves):
    """One entry [W] from the rows of all tokens so far, in double precision; those not there yet are left out."""
    W = bias.shape[1] // halves
    gates, keys = [], []
    for half in range(halves):
        own = slice(half * W, (half + 1) * W)
        owner = entry - (halves - 1) + half
        for place in range(ratio):
            t = owner * ratio + place
            if 0 <= t < len(rows):
                key, gate = rows[t].astype(np.float64).reshape(2, halves * W)
                keys.append(key[own])
                gates.append(gate[own] + bias[place, own])
    p = np.exp(np.array(gates) - np.max(gates, 0))
    return (p * np.array(keys)).sum(0) / p.sum(0)


def compare(S, ratio, halves, position, **kwargs):
    past, rows, arrays = operands(S, ratio, halves, position, **kwargs)
    count = -(-S // ratio)
    wanted = np.stack(
        [
            [by_hand(rows[b], arrays[2], p // ratio + u, ratio, halves) for u in range(count)]
            for b, p in enumerate(past.position.tolist())
        ]
    )
    one, two = (f(arrays, ratio=ratio, halves=halves) for f in (lambda a, **k: eager(compress_tokens, a, **k), _body))
    assert one.dtype == two.dtype == np.float32 and one.shape == two.shape == wanted.shape
    np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(two, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


def _body(arrays, **attributes):
    return body(OP, arrays, **attributes)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("position", range(10))
@pytest.mark.parametrize("S", [1, 4, 7])
def test_every_place_in_an_entry(S, position, halves):
    compare(S, 4, halves, [position])


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("case", [(1, 1, [0, 3]), (30, 4, [5]), (6, 3, [0, 4, 8, 15]), (9, 16, [3, 15, 40])])
def test_equation(case, halves):
    S, ratio, position = case
    compare(S, ratio, halves, position)


@pytest.mark.slow
@given(st.integers(1, 20), st.integers(1, 6), st.lists(st.integers(0, 30), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    halves, W = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    compare(S, ratio, halves, position, W=W, seed=data.draw(st.integers(0, 99)))


def test_large_gates_do_not_overflow():
    *_, arrays = operands(9, 4, 2, [6, 0])
    for array in arrays[:2]:
        array *= 1000
    for got in (eager(compress_tokens, arrays, ratio=4, halves=2), _body(arrays, ratio=4, halves=2)):
        assert np.isfinite(got).all()


@pytest.mark.parametrize(("ratio", "halves", "W"), [(4, 2, 3), (4, 2, 5), (16, 1, 3)])
def test_one_body_serves_every_node(ratio, halves, W):
    """A model's compressors differ in ratio, halves and width, and share the function of the first."""
    *_, first = operands(1, 2, 1, [0])
    key = ("v4", OP, "")
    function = one_node(OP, first, ratio=2, halves=1).functions[key]
    *_, arrays = operands(9, ratio, halves, [6, 0], W=W)
    model = one_node(OP, arrays, ratio=ratio, halves=halves)
    model.functions[key] = function
    wanted = eager(compress_tokens, arrays, ratio=ratio, halves=halves)
    np.testing.assert_allclose(run(model, arrays)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("halves", [1, 2])
def test_registration(halves):
    *_, arrays = operands(6, 3, halves, [0, 4, 8, 15])
    torch.library.opcheck(compress_tokens, (*map(to_torch, arrays), 3, halves))


@pytest.mark.slow
@pytest.mark.parametrize(("ratio", "halves", "W"), [(4, 2, 512), (4, 2, 128), (128, 1, 512)])
def test_tensorrt_builds_it(ratio, halves, W, tmp_path):
    *_, arrays = operands(1, ratio, halves, [5], W=W)
    rows = 2 * halves * W
    dims = [["B", "S", rows], ["B", halves * ratio, rows], [ratio, halves * W], ["B"]]
    sizes = {"B": (1, 1, 2), "S": (1, 512, 512)}
    builds(one_node(OP, arrays, ratio=ratio, halves=halves), dims, sizes, tmp_path)
