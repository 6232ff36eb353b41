from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from engine_of import builds
from histories import Past, attend_by_hand, body, check, check_narrow, eager
from hypothesis import given, settings
from hypothesis import strategies as st
from one_node import body_of, one_node, to_torch

from v4export.plugins.window_attention.op import window_attention

OP = "WindowAttention"
# S new tokens, R slots, positions of the sequences
CASES = {
    "first token": (1, 4, [0]),
    "first chunk": (3, 4, [0]),
    "ring not full": (1, 4, [2]),
    "ring just full": (1, 4, [4]),
    "ring wrapped": (2, 4, [7]),
    "chunk as long as the ring": (4, 4, [5]),
    "chunk longer than the ring": (9, 4, [6]),
    "first chunk longer than the ring": (9, 4, [0]),
    "ring of one": (3, 1, [2]),
    "unequal lengths": (3, 5, [0, 3, 5, 12]),
    "unequal lengths, one token": (1, 5, [4, 11]),
}


def operands(S, R, position, H=3, W=8, seed=0, since=()):
    """The op's operands, and the rows by sequence."""
    past = Past.of(position, S, seed)
    rows = past.rows(W)
    return past, rows, [past.queries(H, W), past.new(rows), past.ring(rows, R, since), past.position, past.normal(H)]


def compare(S, R, position, scale=0.3, since=(), **kwargs):
    past, rows, arrays = operands(S, R, position, since=since, **kwargs)

    def seen(_, b, t):
        return rows[b][max(since[b] if since else 0, t + 1 - R) : t + 1]

    wanted = attend_by_hand(arrays[0], seen, past, scale, arrays[-1])
    check(window_attention, OP, arrays, wanted, optional=[np.array(since)] if since else [], scale=scale)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equation(case):
    compare(*case)


@pytest.mark.parametrize("S", [1, 6])
@pytest.mark.parametrize("since", range(8))
def test_tokens_without_a_row(since, S):
    """From none of the window's to all of it but the new ones; unequal in a batch."""
    compare(S, 4, [7, 7, 9, 0], since=[since, 3, 7, 0])


@pytest.mark.slow
@given(st.integers(1, 9), st.integers(1, 6), st.lists(st.integers(0, 20), min_size=1, max_size=3), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_step(S, R, position, data):
    H, W = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    since = data.draw(st.just(()) | st.tuples(*(st.integers(0, p) for p in position)))
    scale = data.draw(st.sampled_from([0.05, 1.0]))
    compare(S, R, position, scale, H=H, W=W, seed=data.draw(st.integers(0, 99)), since=since)


def test_chunks_do_not_matter():
    """Each token alone, with the ring as it stands then, gives what one chunk gives."""
    past, rows, arrays = operands(7, 4, [6])
    whole = body(OP, arrays, scale=0.3)
    for s in range(7):
        ring = Past.of([6 + s], 1).ring([rows[0][: 6 + s]], 4)
        q, new, _, _, sinks = arrays
        one = body(OP, [q[s : s + 1], new[:, s : s + 1], ring, np.array([6 + s]), sinks], scale=0.3)
        np.testing.assert_allclose(one[0], whole[s], rtol=1e-5, atol=1e-6)
    assert past.B == 1


def test_large_scores_do_not_overflow():
    *_, (q, *rest) = operands(4, 3, [8, 1])
    for got in (eager(window_attention, [q * 300, *rest], scale=1.0), body(OP, [q * 300, *rest], scale=1.0)):
        assert np.isfinite(got).all()


def test_sinks_take_their_share():
    *_, (q, new, ring, position, sinks) = operands(2, 3, [5])
    for run_it in (lambda *a: eager(window_attention, a, scale=1.0), lambda *a: body(OP, a, scale=1.0)):
        none, all_of_it = (run_it(q, new, ring, position, sinks * 0 + value) for value in (-1e30, 1e4))
        assert np.abs(none).max() > 0.1 and not all_of_it.any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_rows_and_wide_sums(dtype):
    *_, arrays = operands(*CASES["unequal lengths"])
    check_narrow(window_attention, OP, arrays, dtype, keep=[4], scale=0.3)


def test_registration():
    *_, arrays = operands(*CASES["unequal lengths"])
    torch.library.opcheck(window_attention, (*map(to_torch, arrays), 0.3))
    torch.library.opcheck(window_attention, (*map(to_torch, arrays), 0.3, torch.tensor([0, 1, 5, 9])))


def test_body_never_joins_the_rows():
    *_, arrays = operands(2, 4, [5])
    joins = [
        n.attributes["axis"].as_int() for n in body_of(one_node(OP, arrays, scale=1.0), OP) if n.op_type == "Concat"
    ]
    # Along axis 0 only shapes are put together.
    assert [axis for axis in joins if axis != 0] == [-1]


def test_untyped_operands_are_an_error():
    from v4export.plugins.window_attention import onnx as written

    *_, arrays = operands(1, 2, [1])
    node = next(n for n in one_node(OP, arrays, scale=1.0).graph if n.op_type == OP)
    node.inputs[0].shape = None
    with pytest.raises(ValueError, match="type of WindowAttention"):
        written.function(node)


@pytest.mark.slow
@pytest.mark.parametrize("since", [[], [3]])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_builds_it(dtype, since, tmp_path):
    *_, arrays = operands(1, 128, [5], H=64, W=512)
    arrays = [a.astype(dtype) if i < 3 else a for i, a in enumerate(arrays)]
    optional = [np.array(since)] if since else []
    dims = [["M", 64, 512], ["B", "S", 512], ["B", 128, 512], ["B"], [64], *[["B"] for _ in optional]]
    sizes = {"M": (1, 512, 1024), "B": (1, 1, 2), "S": (1, 512, 512)}
    builds(one_node(OP, [*arrays, *optional], scale=0.04), dims, sizes, tmp_path)
