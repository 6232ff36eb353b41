"""Where the hashes of Engram layers lead: odd multipliers from a seeded generator, and prime numbers of buckets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType

import numpy as np

from v4export.config import Engram

#: In place of a row number: nothing is looked up, and the row is zeros.
NO_ROW = -1

_INT64_MAX = 2**63 - 1
_SEED_STEP = 10007  # between the generators of layers that follow each other


@dataclass(frozen=True)
class LayerHash:
    """The hashes of one layer, in the order of their rows: by length of n-gram, then by head."""

    multipliers: tuple[int, ...]  # [N]: of the token itself, then of those before it
    primes: tuple[int, ...]  # [(N-1) * heads]: buckets of each hash

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first row of each hash in the layer's table."""
        return (0, *accumulate(self.primes[:-1]))

    @property
    def rows(self) -> int:
        """Rows of the layer's table."""
        return sum(self.primes)


@lru_cache(maxsize=64)
def layouts(engram: Engram) -> Mapping[int, LayerHash]:
    """Layer -> its hashes.

    No two hashes share a number of buckets, in any layer: of every n-gram length the first is sought from ``buckets``
    on, and what an earlier layer or length has taken is passed over. Multipliers are small enough that a product with
    a compressed id stays an int64.
    """
    taken: set[int] = set()
    return MappingProxyType(
        {layer: LayerHash(_multipliers(engram, layer), _primes(engram, taken)) for layer in engram.layers}
    )


def _multipliers(engram: Engram, layer: int) -> tuple[int, ...]:
    half = max(1, _INT64_MAX // engram.compressed_vocab // 2)
    generator = np.random.default_rng(engram.seed + _SEED_STEP * layer)
    drawn = generator.integers(0, half, size=engram.max_order, dtype=np.int64)
    return tuple(int(number) for number in 2 * drawn + 1)


def _primes(engram: Engram, taken: set[int]) -> tuple[int, ...]:
    from sympy import nextprime

    primes = []
    # All from ``buckets`` on to the last that is taken are taken, as each took the first that was free.
    prime = max(taken, default=engram.buckets - 1)
    for _ in range(engram.hashes):
        prime = nextprime(prime)
        taken.add(prime)
        primes.append(prime)
    return tuple(primes)
