"""Multipliers and primes, against published ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from sympy import isprime

from v4export.config import Engram
from v4export.config.hashes import layouts

V41 = Engram(
    layers=(1, 14), max_order=4, heads=8, width=256, buckets=16_000_000, compressed_vocab=99092, pad_token_id=2
)
PAPER = replace(V41, layers=(1, 15), max_order=3, width=64, buckets=646_400)


def test_v41():
    first, second = layouts(V41).values()
    assert first.multipliers == (76632096046245, 4839876093313, 35959672319349, 73987337458391)
    assert second.multipliers == (67716810739261, 51510806800915, 30921347202721, 82619226485591)
    assert first.primes[:3] == (16000057, 16000079, 16000081) and first.primes[-1] == 16000463
    assert second.primes[0] == 16000477 and second.primes[-1] == 16000889
    assert (first.rows, second.rows) == (384_006_168, 384_016_682)
    assert list(layouts(V41)) == [1, 14]


def test_demo_of_the_paper():
    assert [layer.rows for layer in layouts(PAPER).values()] == [10_344_164, 10_348_242]
    assert layouts(PAPER)[1].primes[0] == 646403


@pytest.mark.parametrize("vocab", [1, 2, 3, 1000, 2**31 - 1])
def test_products_stay_in_int64(vocab):
    for layer in layouts(replace(PAPER, buckets=2, compressed_vocab=vocab, seed=3)).values():
        assert all(m % 2 == 1 and m * (vocab - 1) < 2**63 and m < 2**63 for m in layer.multipliers)


def test_primes_are_primes_and_none_occurs_twice():
    primes = [prime for layer in layouts(replace(PAPER, buckets=2)).values() for prime in layer.primes]
    assert all(map(isprime, primes)) and len(set(primes)) == len(primes) and min(primes) == 2


def test_offsets_are_where_the_rows_before_end():
    layer = layouts(PAPER)[15]
    assert layer.offsets[0] == 0 and layer.offsets[-1] + layer.primes[-1] == layer.rows
    assert all(math.fsum(layer.primes[:i]) == offset for i, offset in enumerate(layer.offsets))


def test_another_seed_has_other_multipliers_and_the_same_rows():
    other = layouts(replace(PAPER, seed=1))
    assert other[1].multipliers != layouts(PAPER)[1].multipliers and other[1].primes == layouts(PAPER)[1].primes


def test_asked_again_nothing_is_computed_again():
    assert layouts(V41) is layouts(replace(V41))
