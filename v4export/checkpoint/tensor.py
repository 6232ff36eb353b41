"""One stored tensor: a dtype, a shape, and a run of bytes in a safetensors file; and the header that lists them.

The format: 8 bytes little-endian header length, a JSON header, then the data, without gaps
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from v4export.errors import BadInput
from v4export.side_files import MOST_BYTES, json_value

# safetensors spelling -> NumPy dtype
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
#: Beyond these, NumPy has no such array; and a product of such numbers takes no time.
_MOST_AXES, _MOST_SIZE = 64, 2**63 - 1

# One mapping a file while any array of it is alive: a mapping each would run out of file descriptors, and one kept for
# good would count every page ever touched as resident.
_maps: weakref.WeakValueDictionary[tuple[str, int, int, int, int], mmap.mmap] = weakref.WeakValueDictionary()


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        key = (str(file), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        mapping = _maps.get(key)
        if mapping is None:
            mapping = _maps[key] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return mapping


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor, or a contiguous piece of one, lies. ``name`` is the stored tensor's, for a piece too."""

    name: str
    file: Path
    dtype: str  # safetensors spelling
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    nbytes: int

    def numpy(self) -> np.ndarray:
        """The values as a read-only array over the mapped file; pages are read when touched."""
        if not self.nbytes:
            return np.zeros(self.shape, DTYPES[self.dtype])
        data = np.frombuffer(_map(self.file), np.uint8, self.nbytes, self.offset)
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    def read(self) -> np.ndarray:
        """The values in memory of their own, by one plain read of the file."""
        data = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.offset)
        if data.nbytes != self.nbytes:
            raise BadInput(f"{self.file} became shorter while it was read", f"{self.name} needs {self.nbytes} bytes")
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of axis 0, as ``numpy`` gives them."""
        return self.part0(start, stop).numpy()

    def part0(self, start: int, stop: int) -> StoredTensor:
        """The piece of rows ``start`` to ``stop`` of axis 0."""
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.name}: rows {start}:{stop} of shape {self.shape}")
        row = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row, nbytes=(stop - start) * row)

    def slice0(self, index: int) -> StoredTensor:
        """The piece at ``index`` of axis 0; that axis is dropped."""
        part = self.part0(index, index + 1)
        return replace(part, shape=self.shape[1:])


def read_header(file: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header's bytes and the tensors it lists, in the order of their data.

    Raises:
        BadInput: the file is truncated, the header is too large or not valid, or tensors overlap or leave gaps.
    """
    with file.open("rb") as stream:
        return parse_header(file, stream, os.fstat(stream.fileno()).st_size)


def parse_header(file: Path, stream: BinaryIO, size: int) -> tuple[bytes, dict[str, StoredTensor]]:
    """The same of a stream that holds ``size`` bytes, wherever ``file`` lies."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MOST_BYTES or 8 + length > size:
        values = f"{size} bytes, header of {length}" if len(start) == 8 else f"{size} bytes"
        raise BadInput(f"{file} is truncated or not a safetensors file", values, "Download it again.")
    header = stream.read(length)
    try:
        entries = json_value(header, object_pairs_hook=_no_duplicates)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(file, name, 8 + length, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} has a header that is not valid", str(error), "Download it again.") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for name, tensor in ordered.items():
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "does not follow the tensor before it"
            raise BadInput(f"{file}: {name} {what}", f"it starts at byte {tensor.offset}, expected {end}")
        end += tensor.nbytes
    if end != size:
        what = "is truncated" if size < end else "has bytes after its last tensor"
        raise BadInput(f"{file} {what}", f"{size} bytes, the header describes {end}", "Download it again.")
    return header, ordered


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {name!r} twice")
    return entries


def _tensor(file: Path, name: str, base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    if dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if type(shape) is not list or type(data_offsets) is not list or len(shape) > _MOST_AXES or len(data_offsets) != 2:
        raise ValueError(f"{name} has no shape of at most {_MOST_AXES} axes, or no two data_offsets")
    if any(type(number) is not int or not 0 <= number <= _MOST_SIZE for number in (*shape, *data_offsets)):
        raise ValueError(f"{name} has shape {shape} and data_offsets {data_offsets}")
    begin, end = data_offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise ValueError(f"{name} [{dtype} {shape}] needs {nbytes} bytes, its data_offsets give {end - begin}")
    return StoredTensor(name, file, dtype, tuple(shape), base + begin, nbytes)
