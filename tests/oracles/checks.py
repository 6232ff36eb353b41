"""Compares a runner with what transformers computes in one pass, over chunks, single tokens and unequal batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import hub_models
import numpy as np
import torch
from hub_models import hub_logits
from runners import OnnxRunner, Runner, run_batch, run_one

from v4export import api
from v4export.runtime.onnx import OnnxExecutor

#: Largest error allowed, as a part of the largest logit.
LIMIT = 1e-5
CHUNKS, SINGLES = (1, 5, 33, 2, 17), 64
UNEQUAL = (41, 7, 26)


def random_ids(length: int, seed: int = 0) -> np.ndarray:
    """Token ids."""
    return np.random.default_rng(seed).integers(0, hub_models.SMALL["vocab_size"], length)


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Logits are within the limit."""
    scale = np.abs(theirs).max()
    assert ours.shape == theirs.shape and scale > 0.5, "logits too small to mean anything"
    assert np.abs(ours - theirs).max() <= LIMIT * scale


def reference(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """transformers' logits [S, V]."""
    return hub_logits(model, torch.from_numpy(ids)[None])[0].numpy()


def check_sequence(
    model: torch.nn.Module, runner: Callable[[int], Runner], chunks: Sequence[int] = CHUNKS, singles: int = SINGLES
) -> None:
    """Ragged chunks and then single tokens equal one pass of transformers."""
    ids = random_ids(sum(chunks) + singles)
    check(run_one(runner(1), ids, chunks, singles), reference(model, ids))


def check_unequal(
    model: torch.nn.Module, runner: Callable[[int], Runner], lengths: Sequence[int] = UNEQUAL, chunk: int = 11
) -> None:
    """A batch of unequal lengths equals each sequence alone, and transformers."""
    sequences = [random_ids(length, seed) for seed, length in enumerate(lengths)]
    together = run_batch(runner(len(sequences)), sequences, chunk)
    for ids, logits in zip(sequences, together, strict=True):
        theirs = reference(model, ids)
        check(logits, theirs)
        check(logits, run_one(runner(1), ids, [len(ids)], 0))


class Exported:
    """A transformers model, and its export through onnxruntime."""

    def __init__(self, folder: Path, model: torch.nn.Module) -> None:
        self.model = model
        model.save_pretrained(folder / "hub")
        bundle = api.export(folder / "hub", folder / "out", precision="fp32").bundle
        self.executor = OnnxExecutor(
            bundle.folder, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len, threads=1
        )

    def runner(self, batch: int) -> OnnxRunner:
        """A runner over an empty state."""
        return OnnxRunner(self.executor, batch)
