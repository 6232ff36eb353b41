"""A model that is a hash of every token so far, so that a token that is lost, doubled or moved changes what comes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

VOCAB = 97


def hashed_logits(history: Sequence[int]) -> np.ndarray:
    """[V], a function of every token so far and of their order."""
    value = 1
    for token in history:
        value = (value * 1_000_003 + token + 7) % (2**61 - 1)
    return np.random.default_rng(value).normal(size=VOCAB).astype(np.float32)


def expected_greedy(prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that follow a prompt."""
    history = list(prompt)
    for _ in range(count):
        history.append(int(hashed_logits(history).argmax()))
    return history[len(prompt) :]
