from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import body, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch
from test_index_select import CASES, best_by_hand, operands, scores_by_hand

from v4export.plugins.candidate_select.op import candidate_select
from v4export.plugins.index_reselect.op import index_reselect
from v4export.plugins.index_select.op import index_select

OP = "IndexReselect"


def with_blocks(past, arrays, C, blocks, size):
    """The op's operands: for each query some blocks in any order, -1 between them."""
    count = -(-(C + arrays[2].shape[1]) // size)
    chosen = np.full((past.B * past.S, blocks), -1, np.int64)
    for row in chosen:
        places = past.rng.permutation(blocks)[: past.rng.integers(0, min(blocks, count) + 1)]
        row[places] = past.rng.permutation(count)[: len(places)]
    return [*arrays[:4], chosen, arrays[4]]


def compare(S, C, K, ratio, position, blocks, size, scale=0.3, **kwargs):
    past, keys, arrays = operands(S, C, ratio, position, **kwargs)
    arrays = with_blocks(past, arrays, C, blocks, size)
    scores = scores_by_hand(past, keys, *arrays[:2], ratio)
    wanted = best_by_hand(scores, min(K, C + arrays[2].shape[1]), lambda m, n: n // size in arrays[4][m])
    attributes = dict(top_k=K, ratio=ratio, scale=scale, block_size=size)
    for got in (eager(index_reselect, arrays, **attributes), body(OP, arrays, **attributes)):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("blocks", [(1, 1), (2, 3), (9, 4), (3, 100)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case, blocks):
    compare(*case, *blocks)
    compare(*case, *blocks, whole=False)


@pytest.mark.parametrize("position", range(13))
@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_a_block(S, position):
    compare(S, position // 2 + 1, 3, 2, [position], 3, 3)


@pytest.mark.parametrize("H", [1, 2])
def test_equal_scores_go_to_the_lower_number(H):
    """Whatever the order of the blocks; the second sequence's new keys follow rows that are hidden."""
    for K in (5, 64, 300):
        compare(3, 500, K, 1, [400, 123], 40, 7, H=H, width=2)


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    C, K = max(position) // ratio + data.draw(st.integers(0, 3)), data.draw(st.integers(1, 30))
    blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    H, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    compare(S, C, K, ratio, position, *blocks, H=H, seed=seed)


def test_two_levels_that_keep_all_are_one():
    _, _, arrays = operands(6, 30, 1, [30, 17])
    q, weights, new, cache, position = map(to_torch, arrays)
    numbers, blocks = candidate_select(q, weights, new, cache, position, 9, 1, 0.3, 12, 3)
    for wanted in (numbers, index_select(q, weights, new, cache, position, 9, 1, 0.3)):
        got = index_reselect(q, weights, new, cache, blocks, position, 9, 1, 0.3, 3)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_keys_and_wide_sums(dtype):
    past, _, arrays = operands(3, 30, 1, [30, 17], width=8)
    arrays = with_blocks(past, [arrays[0] * 33, *arrays[1:]], 30, 6, 3)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate(arrays)]
    attributes = dict(top_k=9, ratio=1, scale=0.3, block_size=3)
    wide = [a.astype(np.float32) if a.dtype == dtype else a for a in arrays]
    wanted = eager(index_reselect, wide, **attributes)
    for got in (eager(index_reselect, arrays, **attributes), body(OP, arrays, **attributes)):
        np.testing.assert_array_equal(got, wanted)


def test_registration():
    past, _, arrays = operands(6, 5, 3, [0, 4, 8, 15])
    torch.library.opcheck(index_reselect, (*map(to_torch, with_blocks(past, arrays, 5, 3, 2)), 3, 3, 0.5, 2))


def test_body_never_joins_the_keys():
    past, _, arrays = operands(2, 4, 4, [5])
    model = one_node(OP, with_blocks(past, arrays, 4, 2, 2), top_k=2, ratio=4, scale=1.0, block_size=2)
    joins = [n.attributes["axis"].as_int() for n in body_of(model, OP) if n.op_type == "Concat"]
    assert [axis for axis in joins if axis != 0] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("top_k", "ratio"), [(512, 4), (2048, 1)])
def test_tensorrt_builds_it(dtype, top_k, ratio, tmp_path):
    past, _, arrays = operands(1, 3, 4, [5], H=64, width=128)
    arrays = with_blocks(past, arrays, 3, 2, 2)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate(arrays)]
    dims = [["M", 64, 128], ["M", 64], ["B", "U", 128], ["B", "C", 128], ["M", "K"], ["B"]]
    sizes = {"M": (1, 64, 128), "B": (1, 1, 2), "U": (1, 16, 64), "C": (1, 2048, 65536), "K": (1, 16, 64)}
    builds(one_node(OP, arrays, top_k=top_k, ratio=ratio, scale=0.01, block_size=128), dims, sizes, tmp_path)
