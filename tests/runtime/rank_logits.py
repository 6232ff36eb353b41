"""A bundle's logits for a few prompts, in one process or as torchrun starts it: ``rank_logits.py BUNDLE OUT``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor

PROMPTS = np.random.default_rng(0).integers(1, 200, (2, 23))
LENGTHS = np.array([23, 14])
CHUNK, DECODE = 9, 4


def logits_of(folder: Path) -> np.ndarray:
    """[B, tokens, V] of two prompts of unequal lengths, prefilled in chunks, and of tokens decoded greedily."""
    bundle = Bundle.open(folder)
    how = {"max_seq_len": bundle.max_seq_len, "threads": 1, "sharding": bundle.sharding}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    state, found = executor.new_state(len(PROMPTS)), []
    for start in range(0, PROMPTS.shape[1], CHUNK):
        piece = np.ascontiguousarray(PROMPTS[:, start : start + CHUNK])
        lengths_B = np.clip(LENGTHS - start, 0, piece.shape[1])
        every = np.broadcast_to(np.arange(piece.shape[1]), piece.shape)
        logits = executor.step(piece, state, logits_at_BQ=every, lengths_B=lengths_B)
        real = np.arange(piece.shape[1]) < lengths_B[:, None]
        found.append(np.where(real[..., None], logits, 0))
    token = np.full((len(PROMPTS), 1), 7)
    for _ in range(DECODE):
        found.append(executor.step(token, state, logits_at_BQ=np.zeros_like(token)))
        token = found[-1].argmax(-1)
    return np.concatenate(found, 1)


if __name__ == "__main__":
    said = logits_of(Path(sys.argv[1]))
    np.save(Path(sys.argv[2]) / f"{os.environ.get('RANK', 'alone')}.npy", said)
