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
from v4export.plugins.thought_attention.op import thought_attention

OP = "ThoughtAttention"
# P rows of each thought, T rows of cache, for each sequence the tokens its thoughts are about
CASES = {
    "first token": (1, 1, [[0]]),
    "one thought": (1, 7, [[6]]),
    "a later step": (4, 7, [[6]]),
    "room left": (2, 33, [[8]]),
    "several positions": (1, 9, [[2, 5, 8]]),
    "every position": (3, 6, [[0, 1, 2, 3, 4, 5]]),
    "repeated and unordered": (3, 10, [[5, 2, 5, 8, 0]]),
    "unequal lengths": (2, 12, [[11, 4, 6], [0, 0, 0], [3, 5, 1]]),
    "unequal lengths, one thought": (1, 6, [[2], [5]]),
}
L, W = 8, 12


def operands(P, T, at, H=3, W=W, seed=0):
    # Behind the furthest token that is thought about, the cache holds what must not be looked at.
    past = Past.of([max(tokens) + 1 for tokens in at], len(at[0]), seed)
    cache = past.held(past.rows(W), T)
    own = past.normal(past.B * past.S, P, W)
    return past, [past.queries(H, W), own, cache, np.array(at, np.int64)]


def compare(P, T, at, L=L, scale=0.3, **kwargs):
    past, arrays = operands(P, T, at, **kwargs)
    q, own, cache, _ = arrays

    def seen(m, b, _):
        return [*cache[b, : at[b][m % past.S] + 1], *own[m]]

    wanted = attend_by_hand(q, seen, past, scale, width=L)
    check(thought_attention, OP, arrays, wanted, latent_width=L, scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 20), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(P, B, Q, T, data):
    token = st.integers(0, T - 1)
    at = [data.draw(st.lists(token, min_size=Q, max_size=Q)) for _ in range(B)]
    H, L, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99))
    compare(P, T, at, L, H=H, W=L + data.draw(st.sampled_from([2, 4])), seed=seed)


def test_a_first_step_is_latent_attention_behind_its_token():
    _, arrays = operands(*CASES["several positions"])
    q, own, cache, at = map(to_torch, arrays)
    alone = [latent_attention(q[m, None], own[m, None], cache, at[0, m, None] + 1, L, 0.3) for m in range(3)]
    got = body(OP, arrays, latent_width=L, scale=0.3)
    np.testing.assert_allclose(got, torch.cat(alone).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_rows_and_wide_sums(dtype):
    _, arrays = operands(*CASES["unequal lengths"])
    check_narrow(thought_attention, OP, arrays, dtype, latent_width=L, scale=0.3)


def test_registration():
    _, arrays = operands(*CASES["unequal lengths"])
    torch.library.opcheck(thought_attention, (*map(to_torch, arrays), L, 0.3))


def test_body_never_joins_the_rows():
    _, arrays = operands(*CASES["repeated and unordered"])
    joins = body_of(one_node(OP, arrays, latent_width=L, scale=1.0), OP)
    assert [
        n.attributes["axis"].as_int() for n in joins if n.op_type == "Concat" and n.attributes["axis"].as_int()
    ] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, tmp_path):
    _, arrays = operands(2, 3, [[2]], H=128, W=576)
    arrays = [a.astype(dtype) if i < 3 else a for i, a in enumerate(arrays)]
    dims = [["M", 128, 576], ["M", "P", 576], ["B", "T", 576], ["B", "Q"]]
    sizes = {"M": (1, 8, 32), "P": (1, 4, 8), "B": (1, 1, 2), "T": (1, 4096, 65536), "Q": (1, 8, 16)}
    builds(one_node(OP, arrays, latent_width=512, scale=0.1), dims, sizes, tmp_path)
