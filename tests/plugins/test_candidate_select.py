from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import bodies, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch
from test_index_select import CASES, best_by_hand, operands, scores_by_hand

from v4export.plugins.candidate_select.op import candidate_select
from v4export.plugins.index_select.op import index_select

OP = "CandidateSelect"
# top_blocks, block_size
BLOCKS = [(1, 1), (2, 3), (9, 4), (3, 100)]


def both(arrays, **attributes):
    """Numbers and blocks, by the op and by its body."""
    yield [t.numpy() for t in candidate_select(*map(to_torch, arrays), *attributes.values())]
    yield bodies(OP, arrays, 2, **attributes)


def blocks_by_hand(scores, most, size):
    """By falling score of a block's best, the newest key's first; of equal ones the lower first."""
    cut = [np.split(row, range(size, len(row), size)) if len(row) else [] for row in scores]
    best = [[np.inf if i == len(blocks) - 1 else b.max() for i, b in enumerate(blocks)] for blocks in cut]
    return best_by_hand(best, most)


def compare(S, C, K, ratio, position, top_blocks, size, scale=0.3, **kwargs):
    past, keys, arrays = operands(S, C, ratio, position, **kwargs)
    count = C + arrays[2].shape[1]
    scores = scores_by_hand(past, keys, *arrays[:2], ratio)
    wanted = best_by_hand(scores, min(K, count)), blocks_by_hand(scores, min(top_blocks, -(-count // size)), size)
    attributes = dict(top_k=K, ratio=ratio, scale=scale, top_blocks=top_blocks, block_size=size)
    for got in both(arrays, **attributes):
        for one, two in zip(got, wanted, strict=True):
            assert one.dtype == np.int64
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case, blocks):
    compare(*case, *blocks)
    compare(*case, *blocks, whole=False)


@pytest.mark.parametrize("position", range(13))
@pytest.mark.parametrize("S", [1, 6])
def test_every_place_in_a_block(S, position):
    compare(S, position // 2 + 1, 3, 2, [position], 2, 3)


@pytest.mark.parametrize("H", [1, 2])
def test_equal_scores_go_to_the_lower_number(H):
    """Most scores, and the best of many blocks, are exactly 0; the second sequence's new keys follow hidden rows."""
    for top_blocks, size in ((5, 2), (64, 3), (300, 1)):
        compare(3, 500, 9, 1, [400, 123], top_blocks, size, H=H, width=2)


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    C, K = max(position) // ratio + data.draw(st.integers(0, 3)), data.draw(st.integers(1, 30))
    blocks = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    H, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    compare(S, C, K, ratio, position, *blocks, H=H, seed=seed)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_keys_and_wide_sums(dtype):
    _, _, arrays = operands(3, 30, 1, [30, 17], width=8)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate([arrays[0] * 33, *arrays[1:]])]
    wide = [a.astype(np.float32) if a.dtype == dtype else a for a in arrays]
    attributes = dict(top_k=9, ratio=1, scale=0.3, top_blocks=4, block_size=3)
    wanted, _ = both(wide, **attributes)
    np.testing.assert_array_equal(wanted[0], eager(index_select, wide, top_k=9, ratio=1, scale=0.3))
    for got in both(arrays, **attributes):
        for one, two in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, two)


def test_registration():
    _, _, arrays = operands(6, 5, 3, [0, 4, 8, 15])
    torch.library.opcheck(candidate_select, (*map(to_torch, arrays), 3, 3, 0.5, 2, 2))


def test_body_never_joins_the_keys():
    _, _, arrays = operands(2, 4, 4, [5])
    model = one_node(OP, arrays, outputs=2, top_k=2, ratio=4, scale=1.0, top_blocks=2, block_size=2)
    joins = [n.attributes["axis"].as_int() for n in body_of(model, OP) if n.op_type == "Concat"]
    assert [axis for axis in joins if axis != 0] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("top_k", "ratio"), [(512, 4), (2048, 1)])
def test_tensorrt_builds_it(dtype, top_k, ratio, tmp_path):
    _, _, arrays = operands(1, 3, 4, [5], H=64, width=128)
    arrays = [a.astype(dtype) if i in (0, 2, 3) else a for i, a in enumerate(arrays)]
    dims = [["M", 64, 128], ["M", 64], ["B", "U", 128], ["B", "C", 128], ["B"]]
    sizes = {"M": (1, 64, 128), "B": (1, 1, 2), "U": (1, 16, 64), "C": (1, 2048, 65536)}
    model = one_node(OP, arrays, outputs=2, top_k=top_k, ratio=ratio, scale=0.01, top_blocks=64, block_size=128)
    builds(model, dims, sizes, tmp_path)
