"""Rows of a tensor that stays in its file, read one by one at places that follow no order.

They are read, not mapped. A fault on a mapped file brings in the pages around it as well: a row of 256 bytes then costs
up to 64 KiB of resident memory and more time than the call that reads it, and a file that becomes shorter kills the
process instead of giving a short read. ``benchmarks/engram_lookup.py`` compares the two.
"""

from __future__ import annotations

import io
import os
import weakref

import numpy as np

from v4export.checkpoint.tensor import DTYPES, StoredTensor
from v4export.errors import BadInput

_PROBES = 64
_CAN_ADVISE = hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")


class StoredRows:
    """Rows of a tensor [rows, width] in a file.

    Args:
        tensor: where it lies.
        prefetch: whether ``ask_for`` does anything.

    Raises:
        BadInput: the file cannot be opened, or is too short.
    """

    def __init__(self, tensor: StoredTensor, prefetch: bool = True) -> None:
        self.tensor = tensor
        self.row_bytes = tensor.shape[1] * DTYPES[tensor.dtype].itemsize
        self._prefetch = prefetch and _CAN_ADVISE
        self._probe = [bytearray(1)]
        try:
            self._file = io.FileIO(tensor.file)
        except OSError as error:
            raise BadInput("an Engram table cannot be opened", str(error), "build the bundle again") from error
        self.close = weakref.finalize(self, self._file.close)
        size = os.fstat(self._file.fileno()).st_size
        if tensor.offset + tensor.nbytes > size:
            self.close()
            raise corrupt(tensor, f"it ends at byte {tensor.offset + tensor.nbytes}, the file has {size}")
        if _CAN_ADVISE:
            os.posix_fadvise(self._file.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_RANDOM)

    def ask_for(self, rows: np.ndarray) -> None:
        """Have the system fetch rows [n] that are not in memory; a disk answers many requests in the time of one.

        Asking costs as much as reading what is in memory, so of many rows a sample is looked for there first.
        """
        starts = self._starts(rows)
        if not self._prefetch or (
            len(starts) > _PROBES and all(self._in_memory(start) for start in starts[:: len(starts) // _PROBES])
        ):
            return
        fd, size = self._file.fileno(), self.row_bytes
        for start in starts:
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_WILLNEED)

    def read(self, rows: np.ndarray) -> bytes:
        """Bytes of rows [n] that exist, one after the other.

        Raises:
            BadInput: the file has become shorter, or the disk fails.
        """
        fd, size, pread = self._file.fileno(), self.row_bytes, os.pread
        try:
            pieces = [pread(fd, size, start) for start in self._starts(rows)]
        except OSError as error:
            raise corrupt(self.tensor, str(error)) from error
        data = b"".join(pieces)
        if len(data) != size * rows.size:
            row = next(row for row, piece in zip(rows, pieces, strict=True) if len(piece) < size)
            raise corrupt(self.tensor, f"the file has become shorter: row {row} is not in it")
        return data

    def _starts(self, rows: np.ndarray) -> list[int]:
        return (self.tensor.offset + rows * self.row_bytes).tolist()

    def _in_memory(self, start: int) -> bool:
        try:
            return os.preadv(self._file.fileno(), self._probe, start, os.RWF_NOWAIT) > 0
        except OSError:  # it would have to wait, or the file system cannot say
            return False


def corrupt(tensor: StoredTensor, found: str) -> BadInput:
    """The error for a table that holds what no model has."""
    return BadInput("the Engram table is corrupt", f"{tensor.file}, {tensor.name}: {found}", "copy the file again")
