"""Progress of long stages, on stderr: a bar on a terminal, plain lines elsewhere; time and peak memory of each."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

#: Seconds between looks at the memory that a bar shows.
_LOOK_EVERY = 0.2


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Let Python look for cycles of garbage a hundredth as often: graphs are a million objects, of which few are."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    gc.freeze()  # what is imported stays
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def peak_memory_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux reports KiB, macOS bytes)."""
    with contextlib.suppress(OSError, StopIteration):
        # What getrusage says is never less than what the process had that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / (1 << 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@dataclass(frozen=True)
class StageTime:
    """What one stage cost. ``peak_mib`` is the process's peak up to the stage's end."""

    name: str
    seconds: float
    peak_mib: float


@dataclass
class Stages:
    """Runs stages one after another, shows them, and keeps their cost for the manifest."""

    quiet: bool = False
    done: list[StageTime] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(stderr=True))

    @contextmanager
    def stage(self, name: str, total: float = 1.0) -> Iterator[Callable[[float], None]]:
        """One stage of ``total`` units; the body calls what it is given with the units just finished."""
        start = time.monotonic()
        bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
            console=self.console,
            transient=True,
            disable=self.quiet or not self.console.is_terminal,
        )
        with bar:
            task, looked = bar.add_task(name, total=max(total, 1e-9), memory=""), 0.0

            def advance(units: float) -> None:
                nonlocal looked
                bar.update(task, advance=units)
                if time.monotonic() - looked > _LOOK_EVERY:
                    looked = time.monotonic()
                    bar.update(task, memory=f"peak {peak_memory_mib():.0f} MiB")

            yield advance
        self._finished(StageTime(name, time.monotonic() - start, peak_memory_mib()))

    def again(self, costs: Iterable[StageTime]) -> None:
        """Stages that an earlier process has run, at what they cost there."""
        for cost in costs:
            self._finished(cost, "   before")

    def say(self, text: str) -> None:
        """A line for the user."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _finished(self, cost: StageTime, when: str = "") -> None:
        self.done.append(cost)
        self.say(f"{cost.name:<22} {cost.seconds:7.1f} s   peak {cost.peak_mib:.0f} MiB{when}")
