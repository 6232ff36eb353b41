"""Engram rows a second from tables on disk, three ways: a plain memmap, a mapping with advice, and v4export's table.

Two layers of 24 rows a token, 256 wide, in FP8 with a power of two per 32 columns, to float32. Hashing is not counted.
Each number comes from a process of its own, whose peak resident memory stands beside it. Needs Linux, and 2.2 GB of
disk.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import ml_dtypes
import numpy as np
from page import PAGE, replace_between, row

from v4export.checkpoint.tensor import StoredTensor
from v4export.config import Engram
from v4export.config.hashes import layouts
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table

BEGIN, END = "<!-- measured: engram -->", "<!-- end: engram -->"
VOCAB = 99_092
ENGRAM = Engram(
    layers=(1, 14), max_order=4, heads=8, width=256, buckets=1_578_000, compressed_vocab=VOCAB, pad_token_id=2
)
_RELEASE_PAGES = (64 << 20) // mmap.PAGESIZE
_STEPS = {1: 50, 512: 8}  # tokens of a step -> how many steps are timed
Gather = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Subject:
    """Two tables in a file, and what of it is in memory when a step begins."""

    engram: Engram
    written: bool  # else holes, which cost no disk
    cold: bool


SUBJECTS = {
    "20 GB, pages in memory once touched": Subject(ENGRAM, written=False, cold=False),
    "2 GB, all in memory": Subject(replace(ENGRAM, buckets=157_800), written=True, cold=False),
    "2 GB, nothing in memory": Subject(replace(ENGRAM, buckets=157_800), written=True, cold=True),
}


def tables(engram: Engram, file: Path) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    """Where the tables of the layers lie in a file."""
    end = 0
    for hashes in layouts(engram).values():
        places = []
        for dtype, width in (("F8_E4M3", engram.width), ("F8_E8M0", engram.width // 32)):
            places.append(StoredTensor("embed", file, dtype, (hashes.rows, width), end, hashes.rows * width))
            end += hashes.rows * width
        yield places[0], places[1]


def make(subject: Subject, file: Path) -> None:
    """Holes, and everywhere or in some places one MiB of finite numbers over and over."""
    size = sum(data.nbytes + scale.nbytes for data, scale in tables(subject.engram, file))
    block = np.random.default_rng(0).integers(0, 127, 1 << 20, dtype=np.uint8).tobytes()
    with file.open("wb") as stream:
        stream.truncate(size)
        for start in range(0, size - len(block), len(block) if subject.written else 1 << 30):
            stream.seek(start)
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())


def tokens(pattern: str) -> Iterator[int]:
    """Random tokens, or phrases of eight out of 5000 as often as words of a language occur (Zipf)."""
    rng = np.random.default_rng(1)
    phrases = rng.integers(0, VOCAB, (5000, 8))
    often = 1 / np.arange(1, 5001)
    while True:
        if pattern == "random":
            yield from rng.integers(0, VOCAB, 4096).tolist()
        else:
            yield from phrases[rng.choice(5000, 512, p=often / often.sum())].ravel().tolist()


def plain(data: StoredTensor, scale: StoredTensor) -> Gather:
    codes, scales = (np.memmap(t.file, np.uint8, "r", t.offset, t.shape) for t in (data, scale))

    def gather(rows: np.ndarray) -> np.ndarray:
        values = codes[rows].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        multipliers = scales[rows].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        return (values.reshape(*multipliers.shape, 32) * multipliers[..., None]).reshape(values.shape)

    return gather


class Mapped:
    """What ``StoredRows`` does, on a mapping: random access, pages asked for ahead, given back every 64 MiB."""

    def __init__(self, tensor: StoredTensor) -> None:
        self.tensor, self.row_bytes, self._touched = tensor, tensor.shape[1], 0
        with tensor.file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        self._rows = flat.reshape(tensor.shape)

    def ask_for(self, rows: np.ndarray) -> None:
        pages = np.unique((self.tensor.offset + rows * self.row_bytes) // mmap.PAGESIZE)
        for page in pages.tolist():
            self._map.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)
        self._touched += pages.size

    def read(self, rows: np.ndarray) -> bytes:
        data = self._rows[rows].tobytes()
        if self._touched > _RELEASE_PAGES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0
        return data


def advised(data: StoredTensor, scale: StoredTensor) -> Gather:
    table = Table(data, scale)
    table._data, table._scale = Mapped(data), Mapped(scale)  # type: ignore[assignment]
    return table.gather


def ours(data: StoredTensor, scale: StoredTensor) -> Gather:
    return Table(data, scale).gather


WAYS = {"memmap, astype": plain, "memmap with advice": advised, "v4export": ours}


def measure(way: str, subject: Subject, file: Path, pattern: str, size: int) -> tuple[float, float]:
    """Rows a second, and peak resident memory in MB of this process."""
    stored, hasher = list(tables(subject.engram, file)), Hasher.of(subject.engram, np.arange(VOCAB, dtype=np.int32))
    history, stream, spent = hasher.empty_history(1), tokens(pattern), 0.0
    steps = _STEPS[size]
    gathers = [] if subject.cold else [WAYS[way](*pair) for pair in stored]
    for step in range(steps + 1):
        step_tokens = np.array([list(itertools.islice(stream, size))])
        rows, history = hasher.rows(step_tokens, history)
        if subject.cold:
            gathers.clear()  # the system keeps pages that are mapped
            evict(file)
            gathers = [WAYS[way](*pair) for pair in stored]
        start = time.perf_counter()
        for gather, layer in zip(gathers, rows, strict=True):
            gather(rows[layer])
        spent += (time.perf_counter() - start) * (step > 0)
    status = Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return steps * size * 2 * subject.engram.hashes / spent, int(peak) * 1024 / 1e6


def evict(file: Path) -> None:
    """Have the system forget what it keeps of a file."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(subject: Subject, file: Path) -> None:
    """The same pages in memory for every way: none, or all that there is to read."""
    evict(file)
    if subject.written and not subject.cold:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


@click.command(help=__doc__)
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put the tables for the time being.")
def main(into: Path, folder: Path | None) -> None:
    lines = [row("rows a second (peak MB)", "n-grams", "tokens a step", *WAYS), row(*["---"] * (3 + len(WAYS)))]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for (name, subject), number in zip(SUBJECTS.items(), itertools.count()):
            file = Path(scratch) / f"tables-{number}"
            make(subject, file)
            for pattern, size in itertools.product(("random", "repeated"), _STEPS):
                cells = []
                for way in WAYS:
                    prepare(subject, file)
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        speed, peak = pool.apply(measure, (way, subject, file, pattern, size))
                    cells.append(f"{speed:,.0f} ({peak:.0f})")
                lines.append(row(name, pattern, str(size), *cells))
                click.echo(lines[-1])
            file.unlink()
    replace_between(into, BEGIN, END, ["\n".join(lines)])
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
