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

from v4export.plugins.compressed_attention.op import compressed_attention

OP, R = "CompressedAttention", 4
# S new tokens, C rows of entries, ratio, positions of the sequences
CASES = {
    "first token": (1, 0, 4, [0]),
    "first chunk": (9, 0, 4, [0]),
    "nothing held": (5, 3, 4, [2]),
    "completes an entry": (1, 2, 4, [11]),
    "completes two, one of which it only ends": (5, 3, 4, [7]),
    "room left": (3, 9, 4, [9]),
    "longer than the ring": (13, 3, 8, [23]),
    "entries of one token": (3, 5, 1, [5]),
    "unequal lengths": (6, 5, 3, [0, 4, 8, 15]),
}


def operands(S, C, ratio, position, H=3, W=8, seed=0):
    past = Past.of(position, S, seed)
    rows, entries = past.rows(W), past.rows(W, ratio)
    window = [past.queries(H, W), past.new(rows), past.ring(rows, R)]
    arrays = [*window, past.new(entries, ratio), past.held(entries, C, ratio), past.position, past.normal(H)]
    return past, rows, entries, arrays


def compare(S, C, ratio, position, scale=0.3, **kwargs):
    past, rows, entries, arrays = operands(S, C, ratio, position, **kwargs)

    def seen(_, b, t):
        return [*rows[b][max(0, t + 1 - R) : t + 1], *entries[b][: (t + 1) // ratio]]

    wanted = attend_by_hand(arrays[0], seen, past, scale, arrays[-1])
    check(compressed_attention, OP, arrays, wanted, ratio=ratio, scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)


@pytest.mark.parametrize("position", range(9))
@pytest.mark.parametrize("S", [1, 4, 6])
def test_every_place_in_an_entry(S, position):
    compare(S, position // 4 + 1, 4, [position])


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(0, 20), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, ratio, position, data):
    C = max(position) // ratio + data.draw(st.integers(0, 2))
    compare(S, C, ratio, position, H=data.draw(st.integers(1, 4)), W=data.draw(st.integers(1, 9)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_rows_and_wide_sums(dtype):
    *_, arrays = operands(*CASES["unequal lengths"])
    check_narrow(compressed_attention, OP, arrays, dtype, keep=[6], ratio=3, scale=0.3)


def test_registration():
    *_, arrays = operands(*CASES["unequal lengths"])
    torch.library.opcheck(compressed_attention, (*map(to_torch, arrays), 3, 0.3))


def test_body_never_joins_the_rows():
    *_, arrays = operands(2, 4, 4, [5])
    body = body_of(one_node(OP, arrays, ratio=4, scale=1.0), OP)
    joins = [n.attributes["axis"].as_int() for n in body if n.op_type == "Concat"]
    assert [axis for axis in joins if axis != 0] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, tmp_path):
    *_, arrays = operands(1, 3, 128, [5], H=64, W=512)
    arrays = [a.astype(dtype) if i < 5 else a for i, a in enumerate(arrays)]
    dims = [["M", 64, 512], ["B", "S", 512], ["B", 128, 512], ["B", "U", 512], ["B", "C", 512], ["B"], [64]]
    sizes = {"M": (1, 512, 1024), "B": (1, 1, 2), "S": (1, 512, 512), "U": (1, 4, 4), "C": (0, 256, 8192)}
    builds(one_node(OP, arrays, ratio=128, scale=0.04), dims, sizes, tmp_path)
