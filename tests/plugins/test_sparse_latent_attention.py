from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, attend_by_hand, body, check, check_narrow
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch

from v4export.plugins.latent_attention.op import latent_attention
from v4export.plugins.sparse_latent_attention.op import sparse_latent_attention

OP = "SparseLatentAttention"
# S new tokens, T rows of cache, K, positions of the sequences
CASES = {
    "first token": (1, 1, 1, [0]),
    "first chunk": (9, 1, 3, [0]),
    "one more token": (1, 7, 4, [7]),
    "chunk behind a cache": (5, 33, 8, [33]),
    "room left": (3, 16, 4, [9]),
    "more selected than there are": (2, 3, 9, [3]),
    "unequal lengths": (4, 12, 5, [12, 0, 5]),
    "unequal lengths, one token": (1, 6, 3, [3, 6]),
}
L, W = 8, 12


def operands(S, T, K, position, H=3, W=W, seed=0):
    past = Past.of(position, S, seed)
    rows = past.rows(W)
    selected = np.full((past.B * S, K), -1, np.int64)
    for m, _, t in past.each():
        count = int(past.rng.integers(1, min(K, t + 1) + 1))
        selected[m, past.rng.permutation(K)[:count]] = past.rng.permutation(t + 1)[:count]
    return past, rows, [past.queries(H, W), past.new(rows), past.held(rows, T), selected, past.position]


def compare(S, T, K, position, L=L, scale=0.3, **kwargs):
    past, rows, arrays = operands(S, T, K, position, **kwargs)

    def seen(m, b, _):
        return [rows[b][n] for n in arrays[3][m] if n >= 0]

    wanted = attend_by_hand(arrays[0], seen, past, scale, width=L)
    check(sparse_latent_attention, OP, arrays, wanted, latent_width=L, scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 20), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, K, position, data):
    T, L = max(1, max(position) + data.draw(st.integers(0, 3))), data.draw(st.integers(1, 9))
    H, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    compare(S, T, K, position, L, H=H, W=L + data.draw(st.sampled_from([2, 4])), seed=seed)


def test_all_selected_is_latent_attention():
    past, _, (q, new, cache, _, position) = operands(5, 9, 1, [9, 4])
    selected = np.full((10, 14), -1, np.int64)
    for m, _, t in past.each():
        selected[m, : t + 1] = past.rng.permutation(t + 1)
    dense = latent_attention(*map(to_torch, (q, new, cache, position)), L, 0.3).numpy()
    got = body(OP, [q, new, cache, selected, position], latent_width=L, scale=0.3)
    np.testing.assert_allclose(got, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_rows_and_wide_sums(dtype):
    *_, arrays = operands(*CASES["unequal lengths"])
    check_narrow(sparse_latent_attention, OP, arrays, dtype, latent_width=L, scale=0.3)


def test_registration():
    *_, arrays = operands(*CASES["unequal lengths"])
    torch.library.opcheck(sparse_latent_attention, (*map(to_torch, arrays), L, 0.3))


def test_body_never_joins_the_rows():
    *_, arrays = operands(2, 4, 2, [4])
    joins = body_of(one_node(OP, arrays, latent_width=L, scale=1.0), OP)
    assert [
        n.attributes["axis"].as_int() for n in joins if n.op_type == "Concat" and n.attributes["axis"].as_int()
    ] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, tmp_path):
    *_, arrays = operands(1, 3, 2, [3], H=128, W=576)
    arrays = [a.astype(dtype) if i < 3 else a for i, a in enumerate(arrays)]
    dims = [["M", 128, 576], ["B", "S", 576], ["B", "T", 576], ["M", "K"], ["B"]]
    sizes = {"M": (1, 16, 32), "B": (1, 1, 2), "S": (1, 16, 16), "T": (1, 4096, 65536), "K": (1, 2048, 2048)}
    builds(one_node(OP, arrays, latent_width=512, scale=0.1), dims, sizes, tmp_path)
