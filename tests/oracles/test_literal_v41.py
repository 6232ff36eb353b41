"""The literal DeepSeek-V4.1 is right about what can be told without another implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from literal_v41 import (
    LiteralV41,
    best,
    engram_hash,
    engram_multipliers,
    engram_primes,
    engram_rows,
    is_prime,
    kept_blocks,
    random_text_config,
    random_token_map,
    random_weights,
    rotary_frequencies,
    rotate,
    sink_softmax,
)
from torch import Tensor

REAL_ENGRAM = {
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 8,
    "engram_vocab_size": 16_000_000,
    "engram_compressed_vocab_size": 99092,
}


def model(**changes: object) -> LiteralV41:
    text = random_text_config(**changes)
    token_map = random_token_map(text["vocab_size"], text["engram_compressed_vocab_size"], 0)
    return LiteralV41(text, random_weights(text, 0), token_map)


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


@pytest.fixture(scope="module")
def tiny() -> LiteralV41:
    return model()


def test_primes() -> None:
    assert [n for n in range(30) if is_prime(n)] == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


def test_engram_of_the_released_model() -> None:
    assert engram_multipliers(REAL_ENGRAM) == {
        1: [76632096046245, 4839876093313, 35959672319349, 73987337458391],
        14: [67716810739261, 51510806800915, 30921347202721, 82619226485591],
    }
    primes = {layer: [p for order in orders for p in order] for layer, orders in engram_primes(REAL_ENGRAM).items()}
    assert primes[1][:3] == [16000057, 16000079, 16000081] and primes[1][-1] == 16000463
    assert primes[14][0] == 16000477 and primes[14][-1] == 16000889
    assert {layer: sum(sizes) for layer, sizes in primes.items()} == {1: 384006168, 14: 384016682}


def test_engram_rows() -> None:
    text = random_text_config()
    token_map, ids = random_token_map(97, 61, 0), random_ids(20)
    assert sorted(set(token_map.tolist())) == list(range(61))
    multipliers, primes, rows = engram_multipliers(text), engram_primes(text), engram_rows(text, token_map, ids)
    for layer in text["engram_layer_ids"]:
        sizes = [p for order in primes[layer] for p in order]
        for token in rows[layer]:
            for k, row in enumerate(token):
                assert sum(sizes[:k]) <= row < sum(sizes[: k + 1])
        # What a 64-bit integer holds.
        assert max(multipliers[layer]) * 60 < 2**63

    a, b, c, d = multipliers[1]
    pad = int(token_map[2])
    x, y = int(token_map[ids[0]]), int(token_map[ids[1]])
    assert engram_hash(text, [x, y], pad, multipliers[1])[1] == [
        y * a ^ x * b,
        y * a ^ x * b ^ pad * c,
        y * a ^ x * b ^ pad * c ^ pad * d,
    ]


def test_rotation() -> None:
    scaling = random_text_config()["rope_scaling"]
    frequencies = rotary_frequencies(8, 10000.0, None)
    assert torch.allclose(frequencies, torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64), rtol=1e-15)
    scaled = rotary_frequencies(8, 160000.0, scaling) / rotary_frequencies(8, 160000.0, None)
    # Between the pair that turns once in 64 positions, which is number 0.78, and the first.
    assert scaled.tolist() == pytest.approx([1, 1 / 16, 1 / 16, 1 / 16])
    # Pairs 15.4 and 24.7 turn 32 times and once in 65536 positions.
    wide = {**scaling, "original_max_position_embeddings": 65536}
    scaled = rotary_frequencies(64, 160000.0, wide) / rotary_frequencies(64, 160000.0, None)
    assert scaled[[15, 20, 25]].tolist() == pytest.approx([1, 0.5 + 0.5 / 16, 1 / 16])

    x = torch.randn(3, 12, dtype=torch.float64)
    turned = rotate(x, 5, frequencies)
    assert turned.dtype == torch.float64 and torch.equal(turned[:, :4], x[:, :4])
    a, b = x[1, 6].item(), x[1, 7].item()
    assert turned[1, 6].item() == pytest.approx(a * math.cos(0.5) - b * math.sin(0.5))
    assert turned[1, 7].item() == pytest.approx(a * math.sin(0.5) + b * math.cos(0.5))
    assert torch.allclose(rotate(turned, -5, frequencies), x)


def test_sink_takes_a_share() -> None:
    logits = torch.tensor([[1.0, 2.0], [800.0, 0.0]], dtype=torch.float64)
    sink = torch.tensor([3.0, 800.0], dtype=torch.float64)
    expected = torch.softmax(torch.cat([logits, sink[:, None]], dim=1), dim=1)[:, :2]
    assert torch.allclose(sink_softmax(logits, sink), expected)


def test_lower_number_wins() -> None:
    assert best({0: 1.0, 1: 2.0, 2: 2.0, 3: 0.0, 4: -0.0, 5: 1.0}, 5) == [1, 2, 0, 5, 3]


def test_kept_blocks() -> None:
    scores = dict(enumerate([0.0, 5.0, 3.0, 3.0, 1.0, 3.0, -1.0]))
    assert kept_blocks(scores, 2, 1) == {3}
    assert kept_blocks(scores, 2, 2) == {3, 0}
    assert kept_blocks(scores, 2, 3) == {3, 0, 1}
    assert kept_blocks(scores, 2, 9) == {0, 1, 2, 3}
    assert kept_blocks({}, 2, 2) == set()


def test_mixing(tiny: LiteralV41) -> None:
    h = torch.randn(4, 48, dtype=torch.float64)
    pre, post, comb = tiny._mix(0, "attn", h)
    assert (pre > 0).all() and (pre < 1.1).all() and (post > 0).all() and (post < 2).all()
    assert torch.allclose(comb.sum(dim=0), torch.ones(4, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(comb.sum(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-3)


def test_later_tokens_change_nothing_before(tiny: LiteralV41) -> None:
    ids = random_ids(40)
    logits = tiny.logits(ids)
    assert logits.shape == (40, 97) and logits.dtype == torch.float64 and logits.isfinite().all()
    changed = [*ids[:30], (ids[30] + 1) % 97, *ids[31:]]
    other = tiny.logits(changed)
    assert torch.equal(other[:30], logits[:30])
    assert (other[30:] != logits[30:]).any(dim=1).all()
    assert torch.equal(tiny.logits(ids[:31]), logits[:31])


def test_decoder_start(tiny: LiteralV41) -> None:
    # In three layers, windows of 16 reach 45 tokens back.
    ids, start, reach = random_ids(70), 15, 45
    everywhere, late = tiny.logits(ids), tiny.logits(ids, decoder_start=start)
    assert late[:start].isnan().all() and late[start:].isfinite().all()
    assert (late[start] - everywhere[start]).abs().max() > 1e-3
    assert torch.equal(late[start + reach :], everywhere[start + reach :])


def test_every_tensor_is_read() -> None:
    read: set[str] = set()

    class Recorder(dict):
        def __getitem__(self, name: str) -> Tensor:
            read.add(name)
            return super().__getitem__(name)

    reading = model()
    reading.weights = Recorder(reading.weights)
    reading.logits(random_ids(60))
    assert read == set(reading.weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_topk": 3},
        {"candidate_topk_blocks": 2},
        {"candidate_source_layer_id": -1},
        {"rope_scaling": None},
        {"sliding_window": 12},
        {"hc_sinkhorn_iters": 1},
        {"swiglu_limit": 0.5},
        {"engram_seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_setting_shows(tiny: LiteralV41, changes: dict[str, object]) -> None:
    ids = random_ids(30)
    other = LiteralV41(random_text_config(**changes), tiny.weights, tiny.token_map)
    assert (other.logits(ids)[-1] - tiny.logits(ids)[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_ratios": [0] * 8, "kv_source_layer_ids": [], "index_source_layer_ids": [], "engram_layer_ids": []},
        {"compress_ratios": [0, 3, 3, 0, 3, 4, 4, 0, 9], "kv_source_layer_ids": [1, 5], "engram_layer_ids": [5]},
        {"n_shared_experts": 0, "hc_mult": 2, "engram_max_ngram_size": 2},
        {"n_shared_experts": 2, "o_groups": 4, "engram_n_heads": 3},
    ],
    ids=["windows", "ratios", "fewer", "more"],
)
def test_other_shapes(changes: dict[str, object]) -> None:
    if "compress_ratios" in changes:
        changes = {"index_source_layer_ids": [1, 5], **changes, "candidate_source_layer_id": -1}
    assert model(**changes).logits(random_ids(10)).isfinite().all()


def test_sources_must_fit() -> None:
    with pytest.raises(ValueError, match="no source"):
        model(kv_source_layer_ids=[5])
    with pytest.raises(ValueError, match="otherwise"):
        model(kv_source_layer_ids=[2])
    with pytest.raises(ValueError, match="index source"):
        model(index_source_layer_ids=[2, 6], candidate_source_layer_id=-1)
