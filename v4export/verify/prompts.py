"""What a verification runs: prompts of different lengths, in the checkpoint's own tokens where it has a tokenizer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.runtime.tokenizer import load_tokenizer

#: Tokens of the prompts: one alone, fewer and more than a chunk, and some that end inside one.
LENGTHS = (1, 7, 40, 97)

#: Where entries are compressed, a prompt more goes so many tokens beyond the window, and beyond two of the longest.
BEYOND = 14

_TEXT = """def merge_sorted(left, right):
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]

The ship left harbour at 06:45 on 3 March, 1 842 tonnes of grain aboard; by dusk the wind had turned north-west, and the
captain wrote: "Nothing to report." Ecco la risposta: 17 * 23 = 391, dunque il resto e' 8. Die Zahl ist gerade.
for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }
"""


def prompt_lengths(config: ModelConfig, limit: int) -> list[int]:
    """Tokens of the prompts for a model, none longer than ``limit``."""
    lengths = set(LENGTHS)
    if config.compressed:
        lengths.add(max([config.compressed.window, *(2 * ratio for ratio in config.compressed.ratios)]) + BEYOND)
    return sorted({min(n, limit) for n in lengths if limit > 0})


def default_prompts(folder: Path, config: ModelConfig, limit: int, seed: int = 0) -> list[list[int]]:
    """Prompts of ``prompt_lengths`` tokens.

    Args:
        folder: where a tokenizer may lie.
        config: the model.
        limit: most tokens of a prompt.
        seed: of the random tokens that stand in for text where there is no tokenizer.
    """
    lengths, vocab_size = prompt_lengths(config, limit), config.vocab_size
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    with contextlib.suppress(BadInput):
        tokens = [t for t in load_tokenizer(folder).encode(_TEXT) if t < vocab_size]
    missing = sum(lengths) - len(tokens)
    if missing > 0:
        some = rng.integers(0, vocab_size, missing)
        tokens += np.where(some == config.image_token_id, 0, some).tolist()
    starts = np.cumsum([0, *lengths])
    return [tokens[start : start + n] for start, n in zip(starts, lengths, strict=False)]
