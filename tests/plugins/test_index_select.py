from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, body, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch

from v4export.plugins.index_select.op import index_select

OP = "IndexSelect"
# S new tokens, C rows of keys, K, ratio, positions of the sequences
CASES = {
    "first token": (1, 0, 4, 1, [0]),
    "first token, no entry yet": (1, 0, 4, 4, [0]),
    "first chunk": (9, 0, 3, 4, [0]),
    "first chunk of tokens": (5, 0, 3, 1, [0]),
    "nothing held": (5, 3, 4, 4, [2]),
    "fewer seen than wanted": (3, 9, 12, 4, [9]),
    "completes two": (5, 3, 2, 4, [7]),
    "room left": (1, 40, 8, 1, [33]),
    "unequal lengths": (6, 5, 3, 3, [0, 4, 8, 15]),
    "unequal lengths, tokens": (2, 12, 4, 1, [12, 0, 5]),
}


def operands(S, C, ratio, position, H=2, width=4, seed=0, whole=True):
    """``whole`` numbers make scores exact in any order of summing, and many of them equal."""
    past = Past.of(position, S, seed)
    keys = past.rows(width, ratio)
    arrays = [past.queries(H, width), past.normal(past.B * S, H), past.new(keys, ratio), past.held(keys, C, ratio)]
    if whole:
        arrays, keys = [np.round(a) for a in arrays], [np.round(k) for k in keys]
    return past, keys, [*arrays, past.position]


def scores_by_hand(past, keys, q, weights, ratio):
    """Of every query, the scores of the keys that it sees, by number."""
    q, weights = q.astype(np.float64), weights.astype(np.float64)
    return [weights[m] @ np.maximum(q[m] @ keys[b][: (t + 1) // ratio].T, 0) for m, b, t in past.each()]


def best_by_hand(scores, K, among=lambda m, n: True):
    """Numbers by falling score, then rising number."""
    picked = np.full((len(scores), K), -1, np.int64)
    for m, row in enumerate(scores):
        best = sorted((n for n in range(len(row)) if among(m, n)), key=lambda n: (-row[n], n))[:K]
        picked[m, : len(best)] = best
    return picked


def compare(S, C, K, ratio, position, scale=0.3, **kwargs):
    past, keys, arrays = operands(S, C, ratio, position, **kwargs)
    wanted = best_by_hand(scores_by_hand(past, keys, *arrays[:2], ratio), min(K, C + arrays[2].shape[1]))
    attributes = dict(top_k=K, ratio=ratio, scale=scale)
    for got in (eager(index_select, arrays, **attributes), body(OP, arrays, **attributes)):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)
    compare(*case, whole=False)


@pytest.mark.parametrize("position", range(9))
@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_an_entry(S, position):
    compare(S, position // 4 + 1, 3, 4, [position])


@pytest.mark.parametrize("H", [1, 2])
def test_equal_scores_go_to_the_lower_number(H):
    """With few heads most scores are exactly 0, of either sign; beyond what a small heap or a small sort would hold."""
    for K in (5, 64, 300):
        compare(3, 500, K, 1, [400, 123], H=H, width=2)


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    C, K = max(position) // ratio + data.draw(st.integers(0, 3)), data.draw(st.integers(1, 30))
    H, width, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99))
    compare(S, C, K, ratio, position, H=H, width=width, seed=seed)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_keys_and_wide_sums(dtype):
    """A product such as 33 * 33 would be rounded in bfloat16, and made equal to another."""
    _, _, arrays = operands(3, 30, 1, [30, 17], width=8)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate([arrays[0] * 33, *arrays[1:]])]
    attributes = dict(top_k=9, ratio=1, scale=0.3)
    wide = [a.astype(np.float32) if a.dtype == dtype else a for a in arrays]
    wanted = eager(index_select, wide, **attributes)
    for got in (eager(index_select, arrays, **attributes), body(OP, arrays, **attributes)):
        np.testing.assert_array_equal(got, wanted)


def test_registration():
    _, _, arrays = operands(6, 5, 3, [0, 4, 8, 15])
    torch.library.opcheck(index_select, (*map(to_torch, arrays), 3, 3, 0.5))


def test_body_never_joins_the_keys():
    _, _, arrays = operands(2, 4, 4, [5])
    function = body_of(one_node(OP, arrays, top_k=2, ratio=4, scale=1.0), OP)
    joins = [n.attributes["axis"].as_int() for n in function if n.op_type == "Concat"]
    assert [axis for axis in joins if axis != 0] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("top_k", "ratio"), [(512, 4), (2048, 1)])
def test_tensorrt_builds_it(dtype, top_k, ratio, tmp_path):
    _, _, arrays = operands(1, 3, 4, [5], H=64, width=128)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate(arrays)]
    dims = [["M", 64, 128], ["M", 64], ["B", "U", 128], ["B", "C", 128], ["B"]]
    sizes = {"M": (1, 64, 128), "B": (1, 1, 2), "U": (1, 16, 64), "C": (1, 2048, 65536)}
    builds(one_node(OP, arrays, top_k=top_k, ratio=ratio, scale=0.01), dims, sizes, tmp_path)
