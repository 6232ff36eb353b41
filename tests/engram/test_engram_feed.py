"""Rows of tokens, now or begun ahead."""

from __future__ import annotations

import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from engram_subject import PAD, SMALL, TOKEN_MAP, fp8_table

from v4export.config.hashes import layouts
from v4export.engram.feed import EngramFeed
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.errors import BadInput

HASHER = Hasher.of(SMALL, TOKEN_MAP)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (2, 5))
LENGTHS = np.array([5, 3])


@pytest.fixture
def stored(tmp_path):
    return {layer: fp8_table(tmp_path, hashes.rows, seed=layer) for layer, hashes in layouts(SMALL).items()}


@pytest.fixture
def feed(stored):
    with EngramFeed(HASHER, {layer: Table(*pair) for layer, pair in stored.items()}) as feed:
        yield feed


def same(found, expected):
    (rows, history), (their_rows, their_history) = found, expected
    return np.array_equal(history, their_history) and all(np.array_equal(rows[i], their_rows[i]) for i in SMALL.layers)


def test_rows_are_the_tables_at_the_hashes(feed, stored):
    history = HASHER.empty_history(2)
    masked = np.array([[False, True, False, False, False]] * 2)
    found, after = feed.rows(TOKENS, history, LENGTHS, masked)
    numbers, expected = HASHER.rows(TOKENS, history, LENGTHS, masked)
    assert np.array_equal(after, expected)
    for layer, rows in found.items():
        assert rows.shape == (2, 5, SMALL.row_dim) and rows.dtype == np.float32
        table = Table(*stored[layer])
        assert np.array_equal(rows[0, 0], table.gather(numbers[layer][0, 0]).ravel())
        assert rows[0, 2].any() and not rows[0, 1].any() and not rows[1, 3:].any()
    assert feed.rows(TOKENS[:, :0], history)[0][1].shape == (2, 0, SMALL.row_dim)


def test_the_feed_has_a_type(stored):
    feed = EngramFeed(HASHER, {layer: Table(*pair) for layer, pair in stored.items()}, ml_dtypes.bfloat16)
    assert feed.rows(TOKENS, HASHER.empty_history(2))[0][1].dtype == ml_dtypes.bfloat16
    feed.close()


def count_computations(feed, monkeypatch):
    calls, compute = [], feed._compute
    monkeypatch.setattr(feed, "_compute", lambda *args: (calls.append(threading.current_thread()), compute(*args))[1])
    return calls


def test_what_was_begun_ahead_is_taken(feed, monkeypatch):
    history, expected = HASHER.empty_history(2), feed.rows(TOKENS, HASHER.empty_history(2), LENGTHS)
    calls = count_computations(feed, monkeypatch)
    mine = TOKENS.copy()
    feed.prefetch(mine, history, LENGTHS)
    mine[:] = 0  # the caller's array is its own again
    assert same(feed.rows(TOKENS, history, LENGTHS), expected)
    assert len(calls) == 1 and calls[0] is not threading.current_thread()
    assert same(feed.rows(TOKENS, history, LENGTHS), expected)
    assert calls[1] is threading.current_thread()


def test_another_call_drops_it(feed, monkeypatch):
    history, other = HASHER.empty_history(2), TOKENS[::-1].copy()
    expected = feed.rows(other, history), feed.rows(TOKENS, history)
    calls = count_computations(feed, monkeypatch)
    feed.prefetch(TOKENS, history)
    assert same(feed.rows(other, history), expected[0])
    assert same(feed.rows(TOKENS, history), expected[1])
    feed.prefetch(other, history)
    feed.prefetch(TOKENS, history)
    assert same(feed.rows(TOKENS, history), expected[1])
    assert calls[-1] is not threading.current_thread()
    feed.prefetch(TOKENS, history)
    assert feed.rows(TOKENS, history, LENGTHS)[1].tolist() != expected[1][1].tolist()


def test_errors_surface_where_the_rows_are_asked_for(feed):
    bad = np.array([[0, 99]])
    feed.prefetch(bad, HASHER.empty_history(1))
    with pytest.raises(BadInput, match="token ids are not in the vocabulary\n  99"):
        feed.rows(bad, HASHER.empty_history(1))
    feed.prefetch(bad, HASHER.empty_history(1))
    assert feed.rows(TOKENS, HASHER.empty_history(2))[1].shape == (2, 3)


def test_closing_ends_the_thread(feed):
    before = threading.active_count()
    feed.prefetch(TOKENS, HASHER.empty_history(2))
    assert threading.active_count() == before + 1
    feed.close()
    assert threading.active_count() == before
    feed.close()


@pytest.mark.slow
def test_a_feed_that_nobody_closed_does_not_hold_up_the_end(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_engram_feed import *; from pathlib import Path\n"
        "tables = {l: Table(*fp8_table(Path(sys.argv[2]), h.rows, seed=l)) for l, h in layouts(SMALL).items()}\n"
        "EngramFeed(HASHER, tables).prefetch(TOKENS, HASHER.empty_history(2))\n"
        "feed = EngramFeed(HASHER, tables); feed.prefetch(TOKENS, HASHER.empty_history(2))"
    )
    here = __file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code, here, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr


def test_tables_of_another_model(stored):
    tables = {layer: Table(*pair) for layer, pair in stored.items()}
    with pytest.raises(BadInput, match="the Engram tables do not match the hashes"):
        EngramFeed(HASHER, {1: tables[1]})
    with pytest.raises(BadInput, match="the Engram tables do not match the hashes"):
        EngramFeed(HASHER, {1: tables[4], 4: tables[1]})
    assert HASHER.pad == PAD
