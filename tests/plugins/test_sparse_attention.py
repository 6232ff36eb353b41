from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, attend_by_hand, check, check_narrow
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch

from v4export.plugins.sparse_attention.op import sparse_attention

OP, R = "SparseAttention", 4
# S new tokens, C rows of entries, K, ratio, positions of the sequences
CASES = {
    "first token": (1, 1, 1, 4, [0]),
    "first chunk": (9, 1, 3, 4, [0]),
    "completes an entry": (1, 2, 2, 4, [11]),
    "completes two": (5, 3, 4, 4, [7]),
    "room left": (3, 9, 2, 4, [9]),
    "more selected than there are": (2, 3, 9, 4, [9]),
    "entries of one token": (3, 5, 4, 1, [5]),
    "unequal lengths": (6, 5, 3, 3, [0, 4, 8, 15]),
}


def operands(S, C, K, ratio, position, H=3, W=8, seed=0, since=()):
    past = Past.of(position, S, seed)
    rows, entries = past.rows(W), past.rows(W, ratio)
    window = [past.queries(H, W), past.new(rows), past.ring(rows, R, since)]
    selected = some(past, K, ratio)
    arrays = [*window, past.new(entries, ratio), past.held(entries, C, ratio), selected, past.position, past.normal(H)]
    return past, rows, entries, arrays


def some(past, K, ratio):
    """At most K of the numbers each query can see, in any order; -1 stands between them."""
    selected = np.full((past.B * past.S, K), -1, np.int64)
    for m, _, t in past.each():
        count = min(K, (t + 1) // ratio)
        places = past.rng.permutation(K)[:count]
        selected[m, places] = past.rng.permutation((t + 1) // ratio)[:count]
    return selected


def compare(S, C, K, ratio, position, scale=0.3, since=(), **kwargs):
    past, rows, entries, arrays = operands(S, C, K, ratio, position, since=since, **kwargs)

    def seen(m, b, t):
        first = max(since[b] if since else 0, t + 1 - R)
        return [*rows[b][first : t + 1], *(entries[b][n] for n in arrays[5][m] if n >= 0)]

    wanted = attend_by_hand(arrays[0], seen, past, scale, arrays[-1])
    optional = [np.array(since)] if since else []
    check(sparse_attention, OP, arrays, wanted, optional=optional, ratio=ratio, scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)


@pytest.mark.parametrize("position", range(9))
@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_an_entry(S, position):
    compare(S, position // 4 + 1, 3, 4, [position])


@pytest.mark.parametrize("S", [1, 6])
@pytest.mark.parametrize("since", range(8))
def test_tokens_without_a_row(since, S):
    """Their entries are seen all the same."""
    compare(S, 3, 2, 4, [7, 7, 9, 0], since=[since, 3, 7, 0])


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(0, 20), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    C = max(1, max(position) // ratio + data.draw(st.integers(0, 2)))
    H, W = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    compare(S, C, data.draw(st.integers(1, 9)), ratio, position, H=H, W=W, seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_rows_and_wide_sums(dtype):
    *_, arrays = operands(*CASES["unequal lengths"])
    check_narrow(sparse_attention, OP, arrays, dtype, keep=[7], ratio=3, scale=0.3)


def test_registration():
    *_, arrays = operands(*CASES["unequal lengths"])
    torch.library.opcheck(sparse_attention, (*map(to_torch, arrays), 3, 0.3))
    torch.library.opcheck(sparse_attention, (*map(to_torch, arrays), 3, 0.3, torch.tensor([0, 1, 5, 9])))


def test_body_never_joins_the_rows():
    *_, arrays = operands(2, 4, 2, 4, [5])
    body = body_of(one_node(OP, arrays, ratio=4, scale=1.0), OP)
    joins = [n.attributes["axis"].as_int() for n in body if n.op_type == "Concat"]
    assert [axis for axis in joins if axis != 0] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("since", [[], [3]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, since, tmp_path):
    *_, arrays = operands(1, 3, 2, 4, [5], H=64, W=512)
    arrays = [a.astype(dtype) if i < 5 else a for i, a in enumerate(arrays)]
    entries = [["B", "U", 512], ["B", "C", 512], ["M", "K"]]
    optional = [np.array(since)] if since else []
    dims = [["M", 64, 512], ["B", "S", 512], ["B", 128, 512], *entries, ["B"], [64], *[["B"] for _ in optional]]
    sizes = {"M": (1, 64, 128), "B": (1, 1, 2), "S": (1, 64, 64), "U": (1, 16, 16), "C": (1, 256, 16384)}
    model = one_node(OP, [*arrays, *optional], ratio=4, scale=0.04)
    builds(model, dims, sizes | {"K": (1, 512, 512)}, tmp_path)
