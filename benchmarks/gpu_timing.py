"""Times on the GPU at hand, by CUDA events, of calls replayed from a CUDA graph."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from v4export.plugins.kernels.call import call
from v4export.plugins.kernels.kernel import Kernel

Call = Callable[[], object]
EMPTY = Kernel("Empty", Path(__file__).with_name("empty.cu"), ("x int32 N",), ("y int32 N",), threads=lambda _: 32)
#: Most calls of a graph, seconds between two events, and how often these are taken.
_CALLS, _SECONDS, _ROUNDS = 64, 5e-3, 5
#: Seconds that a graph's calls should take; one of a long call has few.
_LONG = 0.1


class Timer:
    """Seconds of calls, in the order in which a warm GPU does them.

    Attributes:
        l2: bytes of the cache that operands must be larger than.
    """

    def __init__(self) -> None:
        self.l2 = int(torch.cuda.get_device_properties(0).L2_cache_size)

    def seconds(self, calls: Sequence[Call], graphed: bool = True) -> float:
        """Of one call: the median of several rounds in which these calls take turns.

        Args:
            calls: the same with different operands.
            graphed: whether a graph can hold them; what waits for the GPU it cannot.
        """
        for one in (*calls, calls[0]):
            one()
        about, turns = self._between(calls[0]), itertools.cycle(calls)
        if graphed:
            graph, count = torch.cuda.CUDAGraph(), max(len(calls), min(_CALLS, math.ceil(_LONG / about)))
            with torch.cuda.graph(graph):
                for one in itertools.islice(turns, count):
                    one()
            return self._rounds(graph.replay) / count
        return self._rounds(lambda: next(turns)())

    def _rounds(self, once: Call) -> float:
        once()
        about = self._between(once)
        count = max(1, math.ceil(_SECONDS / about))
        return statistics.median(self._between(*[once] * count) / count for _ in range(_ROUNDS))

    def _between(self, *calls: Call) -> float:
        """Seconds that the GPU takes for all of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for one in calls:
            one()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy that no cache holds."""
        source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds([lambda: target.copy_(source)], graphed=False)

    def matrix_rate(self, size: int = 8192) -> float:
        """Operations a second of a product of random bfloat16 matrices; of zeros it would be faster."""
        a, b = (torch.empty(size, size, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
        return 2 * size**3 / self.seconds([lambda: a @ b], graphed=False)

    def empty(self) -> float:
        """Seconds of a launch that does nothing, among others of its kind."""
        x = torch.zeros(1, dtype=torch.int32, device="cuda")
        return self.seconds([lambda: call(EMPTY, x)])


def machine() -> str:
    """The GPU, its driver and what runs on it, for the page."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"{torch.cuda.get_device_name(0)}, driver {driver}, torch {torch.__version__}"
