"""How fast this machine reads its memory: what no decoded token can be faster than."""

from __future__ import annotations

import os
import time

#: More than any cache holds, and how often it is read.
_BYTES, _TIMES = 1 << 30, 8


def read_bandwidth(threads: int) -> float:
    """Bytes a second that so many threads read, the best of several reads of 1 GiB; 0 threads are one for each CPU."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    try:
        block = torch.ones(_BYTES // 4)
        best = float("inf")
        for _ in range(_TIMES):
            start = time.perf_counter()
            block.sum()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return _BYTES / best
