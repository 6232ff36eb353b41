"""Prints how many allocations the kernels make over a sequence: the first of a process, and then another as long.

By one thread, so that the same one comes to every task again. Needs allocations.cpp, loaded before all else.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np

from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor

PROMPT, STEPS = 20, 30


def main(folder: str) -> None:
    bundle = Bundle.open(Path(folder))
    how = {"max_seq_len": 128, "threads": 1, "kernels": True}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    ids = np.random.default_rng(0).integers(0, bundle.config.vocab_size, (1, PROMPT + STEPS))
    counter = ctypes.CDLL(None)
    counter.count_allocations(True)
    for _ in range(2):
        before, state = counter.counted_allocations(), executor.new_state()
        executor.step(ids[:, :PROMPT], state, logits_at_BQ=np.array([[PROMPT - 1]]))
        for at in range(PROMPT, PROMPT + STEPS):
            executor.step(ids[:, at : at + 1], state, logits_at_BQ=np.zeros((1, 1), np.int64))
        print(counter.counted_allocations() - before)


if __name__ == "__main__":
    main(sys.argv[1])
