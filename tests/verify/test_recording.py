"""What a sequence leaves at the boundaries does not depend on what it is batched with, nor on how it is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from v4export import presets
from v4export.runtime.onnx import OnnxExecutor
from v4export.verify.prompts import LENGTHS, default_prompts, prompt_lengths
from v4export.verify.recording import record, tap_names

PROMPTS = [[5, 6, 7], list(range(10, 30)), [42]]


@pytest.fixture(scope="module")
def runs(exported):
    bundle = exported("fp32")
    executor = OnnxExecutor(
        bundle.folder, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len, taps=tap_names(bundle.config)
    )
    return lambda prompts, chunk=8, decode=3: record(executor, bundle.config, prompts, chunk=chunk, decode=decode)


def assert_same(one, other):
    assert one.tokens.tolist() == other.tokens.tolist()
    for a, b in ((one.hidden, other.hidden), (one.state, other.state), ({0: one.logits}, {0: other.logits})):
        assert a.keys() == b.keys()
        for key in a:
            # Of a state tensor there may be no row yet.
            np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-3 * np.abs(a[key]).max(initial=0))
    for layer in one.experts:
        assert (np.sort(one.experts[layer]) == np.sort(other.experts[layer])).mean() > 0.99


def test_unequal_lengths_in_a_batch(runs):
    for alone, together in zip([runs([p])[0] for p in PROMPTS], runs(PROMPTS), strict=True):
        assert_same(alone, together)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks(runs, chunk):
    assert_same(runs([PROMPTS[1]])[0], runs([PROMPTS[1]], chunk)[0])


def test_shapes(runs, exported):
    config = exported("fp32").config
    (found,) = runs([PROMPTS[1]])
    n = 20 + 3
    assert found.tokens[:20].tolist() == PROMPTS[1]
    assert {v.shape for v in found.hidden.values()} == {(n, config.hidden_size)} and sorted(found.hidden) == [
        -1,
        0,
        1,
        2,
        3,
    ]
    assert {v.shape for v in found.experts.values()} == {(n, config.experts_per_token)} and sorted(found.experts) == [
        1,
        2,
        3,
    ]
    assert {k: v.shape for k, v in found.state.items()} == {(i, "latent"): (n, config.latent_dim) for i in range(4)}
    assert found.selected == {}
    assert found.logits.shape == (n, config.vocab_size)
    assert found.logits[19:-1].argmax(-1).tolist() == found.tokens[20:].tolist()  # decoding is greedy


@pytest.mark.slow
def test_shapes_of_v4(random_bundle):
    bundle = random_bundle("tiny-v4", "fp32")
    c = bundle.config
    executor = OnnxExecutor(bundle.folder, c, bundle.precision, max_seq_len=512, taps=tap_names(c))
    runs = [record(executor, c, [list(range(50))], chunk=chunk, decode=3)[0] for chunk in (37, 1, 7)]
    found, n = runs[0], 53
    assert {v.shape for v in found.hidden.values()} == {(n, c.hyper.streams, c.hidden_size)}
    assert sorted(found.selected) == [1, 3] and {v.shape for v in found.selected.values()} == {(n, c.indexer.top_k)}
    assert (found.selected[1][:3] == -1).all() and (found.selected[1][3] >= 0).sum() == 1
    shapes = {name: found.state[1, name].shape for layer, name in found.state if layer == 1}
    assert shapes == {
        "window": (16, 32), "entry": (13, 32), "open": (8, 128), "index_key": (13, 16), "index_open": (8, 64),
    }  # fmt: skip
    assert found.state[2, "entry"].shape == (0, 32) and found.state[2, "open"].shape == (n, 64)
    for other in runs[1:]:
        assert_same(found, other)
        assert all((np.sort(found.selected[i]) == np.sort(other.selected[i])).mean() > 0.99 for i in found.selected)


def test_default_prompts(trained_checkpoint, tmp_path):
    config = dataclasses.replace(presets.load("tiny-v3"), vocab_size=2048)
    prompts = default_prompts(trained_checkpoint, config, 512)
    assert [len(p) for p in prompts] == sorted(LENGTHS) and all(0 <= t < 2048 for p in prompts for t in p)
    assert [len(p) for p in default_prompts(trained_checkpoint, config, 20)] == [1, 7, 20]
    small = dataclasses.replace(config, vocab_size=50)
    without = default_prompts(tmp_path, small, 512)
    assert [len(p) for p in without] == sorted(LENGTHS) and max(max(p) for p in without) < 50
    assert without == default_prompts(tmp_path, small, 512)


def test_prompts_go_beyond_the_window_and_the_longest_entries():
    v4, flash = presets.load("tiny-v4"), presets.load("deepseek-v4-flash")
    assert prompt_lengths(v4, 4000) == prompt_lengths(flash, 4000) == [1, 7, 40, 97, 270]
    assert {n % 4 for n in prompt_lengths(v4, 4000)} == {0, 1, 2, 3} and prompt_lengths(v4, 60) == [1, 7, 40, 60]
    windows = dataclasses.replace(
        v4, compressed=dataclasses.replace(v4.compressed, layers=("window",) * 4, ratios=(0,) * 4)
    )
    assert prompt_lengths(windows, 4000) == [1, 7, 30, 40, 97]
