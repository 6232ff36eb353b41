"""Tensors that are converted and written, into files of a bounded size, each a unit of the build.

Three things are done at a time: some rows are converted, those before them are written and hashed, and what the next
file follows from is hashed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import torch

from v4export.checkpoint.tensor import DTYPES
from v4export.units import At, Units, hashed

T, U = TypeVar("T"), TypeVar("U")

FOLDER = "weights"
#: safetensors' spelling of the dtypes a graph can hold. ``F4`` and ``I4`` are two numbers a byte, which files declare
#: as bytes.
SAFETENSORS_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float4_e2m1fn": "F4",
    "int8": "I8",
    "int4": "I4",
    "uint8": "U8",
    "int64": "I64",
}
#: The type that a graph has E8M0 multipliers in, which no runtime reads: byte n is 2^(n - 127).
EXPONENTS = "uint8"
_PACKED = {"float4_e2m1fn": ml_dtypes.float4_e2m1fn, "int4": ml_dtypes.int4}


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a graph dtype's name; packed numbers are single ones."""
    return np.dtype(_PACKED[name]) if name in _PACKED else DTYPES[SAFETENSORS_NAMES[name]]


#: Of a file of converted tensors, which is what a build that is stopped may have to write again.
_SHARD_BYTES = 1 << 30
#: Windows of rows that may wait to be written.
_WAITING = 4


@dataclass(frozen=True)
class Placed:
    """One initialiser's bytes: ``location`` is relative to OUT, ``offset`` and ``nbytes`` are in bytes.

    ``shape`` is in numbers, of which packed types have two a byte.
    """

    name: str
    location: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """A tensor to write: its dtype and shape, its rows in order, and all that those follow from, contents as hashes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[np.ndarray]]
    depends: Callable[[], Any]

    @property
    def nbytes(self) -> int:
        """Bytes once written."""
        numbers = int(np.prod(self.shape))
        return numbers // 2 if self.dtype in _PACKED else numbers * numpy_dtype(self.dtype).itemsize

    @property
    def declared(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape in the header of the file: packed numbers are declared as the bytes that they are in."""
        if self.dtype in _PACKED:
            return "U8", (*self.shape[:-1], self.shape[-1] // 2)
        return SAFETENSORS_NAMES[self.dtype], self.shape


def write(
    conversions: Sequence[Conversion], units: Units, stem: str, advance: Callable[[float], None]
) -> dict[str, Placed]:
    """Write tensors, row by row, into files ``weights/STEM-*.safetensors``, a unit each; where each lies."""
    placed: dict[str, Placed] = {}
    for number, (shard, depends) in enumerate(_ahead(_depends, _shards(conversions)), 1):
        location = f"{FOLDER}/{stem}-{number:05}.safetensors"
        header, lie = _laid_out(shard, location)
        if units.find(location, depends, bool):
            advance(sum(c.nbytes for c in shard))
        else:
            units.make(location, depends, functools.partial(_write, shard, header, location, advance))
        placed |= lie
    return placed


def _depends(shard: Sequence[Conversion]) -> str:
    """All that a shard's bytes follow from: a hash, since a shard may have tens of thousands of tensors."""
    return hashed([(c.name, c.dtype, c.shape, c.depends()) for c in shard])


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[tuple[T, U]]:
    """Each item with what the function makes of it, which a thread does while the item before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        before: tuple[T, Future[U]] | None = None
        for item in items:
            after = item, thread.submit(function, item)
            if before:
                yield before[0], before[1].result()
            before = after
        if before:
            yield before[0], before[1].result()


def _shards(conversions: Sequence[Conversion]) -> Iterator[list[Conversion]]:
    shard: list[Conversion] = []
    size = 0
    for conversion in conversions:
        if shard and size + conversion.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(conversion)
        size += conversion.nbytes
    if shard:
        yield shard


def _laid_out(conversions: Sequence[Conversion], location: str) -> tuple[bytes, dict[str, Placed]]:
    """How the file begins that holds tensors, and where each lies in it."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for c in conversions:
        dtype, shape = c.declared
        header[c.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + c.nbytes]}
        end += c.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    base, placed = 8 + len(text), {}
    for c in conversions:
        placed[c.name] = Placed(c.name, location, base, c.nbytes, c.dtype, c.shape)
        base += c.nbytes
    return len(text).to_bytes(8, "little") + text, placed


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: another hashes and another writes, and operations are too short to wait for a third."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write(
    conversions: Sequence[Conversion], header: bytes, location: str, advance: Callable[[float], None], at: At
) -> bool:
    """One safetensors file, streamed. The library's writer wants all tensors in memory, so the header is made here."""
    digest, waiting = hashlib.sha256(), deque[Future[None]]()

    with open(at(location), "wb") as file, ThreadPoolExecutor(1) as writer, _one_thread():

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(header)
        for rows in (rows for conversion in conversions for rows in conversion.rows()):
            waiting.append(writer.submit(put, np.ascontiguousarray(rows).view(np.uint8).data))
            if len(waiting) > _WAITING:
                waiting.popleft().result()
            advance(rows.nbytes)
        for written in waiting:
            written.result()
        assert file.tell() == len(header) + sum(c.nbytes for c in conversions)
    at.hashed(location, digest.hexdigest())
    return True
