from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, body, check, check_narrow
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import count, one_node, to_torch

from v4export.plugins.engram_conv.op import engram_conv

OP = "EngramConv"


def operands(S, K, dilation, position, P=6, seed=0):
    """The op's operands, and the rows by sequence; slots of the ring that no token is in hold anything."""
    past = Past.of(position, S, seed)
    rows = past.rows(P)
    return past, rows, [past.new(rows), past.ring(rows, (K - 1) * dilation), past.normal(P, K), past.position]


def by_hand(past, rows, weight, dilation):
    """From the equation, a token at a time, in double precision."""
    K = weight.shape[1]
    out = np.empty((past.B * past.S, len(weight)))
    for m, b, t in past.each():
        taps = [(weight[:, K - 1 - j], rows[b][t - j * dilation]) for j in range(K) if t >= j * dilation]
        total = sum(w.astype(np.float64) * x for w, x in taps)
        out[m] = total / (1 + np.exp(-total))
    return out.reshape(past.B, past.S, -1)


def compare(S, K, dilation, position, **kwargs):
    past, rows, arrays = operands(S, K, dilation, position, **kwargs)
    check(engram_conv, OP, arrays, by_hand(past, rows, arrays[2], dilation), dilation=dilation)


@pytest.mark.parametrize("position", range(15))
@pytest.mark.parametrize("S", [1, 4, 20])
def test_every_slot_of_the_ring(S, position):
    compare(S, 4, 3, [position])


@pytest.mark.parametrize("case", [(1, 2, 1, [0, 3]), (30, 2, 5, [4]), (6, 3, 2, [0, 3, 4, 15]), (1, 4, 3, [0, 8, 40])])
def test_equation(case):
    compare(*case)


@pytest.mark.slow
@given(st.integers(1, 20), st.integers(2, 5), st.integers(1, 5), st.lists(st.integers(0, 30), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, K, dilation, position):
    compare(S, K, dilation, position, P=3)


def test_chunks_do_not_matter():
    """Each token alone, with the ring as it stands then, gives what one chunk gives."""
    _, rows, arrays = operands(7, 4, 3, [6])
    whole = body(OP, arrays, dilation=3)
    for s in range(7):
        ring = Past.of([6 + s], 1).ring([rows[0][: 6 + s]], 9)
        one = body(OP, [arrays[0][:, s : s + 1], ring, arrays[2], np.array([6 + s])], dilation=3)
        np.testing.assert_allclose(one[:, 0], whole[:, s], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("keep", [[], [1, 2]])
def test_narrow(dtype, keep):
    """Whether ring and weight are float32 or not."""
    _, _, arrays = operands(6, 3, 2, [0, 3, 4, 15])
    arrays[1] /= 50  # what no token is in is still a number of float16's
    check_narrow(engram_conv, OP, arrays, dtype, keep=keep, dilation=2)


def test_registration():
    _, _, arrays = operands(6, 3, 2, [0, 3, 4, 15])
    torch.library.opcheck(engram_conv, (*map(to_torch, arrays), 2))


def test_body_is_as_small_for_any_kernel():
    sizes = {count(one_node(OP, operands(1, K, 3, [5])[2], dilation=3), OP) for K in (2, 4, 9)}
    assert sizes == {51}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, tmp_path):
    _, _, arrays = operands(1, 4, 3, [5], P=2048)
    arrays = [a.astype(dtype) if a.dtype == np.float32 else a for a in arrays]
    dims = [["B", "S", 2048], ["B", 9, 2048], [2048, 4], ["B"]]
    builds(one_node(OP, arrays, dilation=3), dims, {"B": (1, 1, 2), "S": (1, 512, 512)}, tmp_path)
