"""Looks for NaN and infinity in stored tensors, by plain reads of bounded size and tests on the bits.

Mapped pages would count as resident memory and stay; a window is read over and over into the same place instead.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterable

import numpy as np

from v4export.checkpoint.tensor import StoredTensor

WINDOW = 4 << 20  # bytes; a multiple of every item size

# dtype -> (unsigned type of the same width, bits that are not the sign, first pattern of those that is not finite)
NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
}


def not_finite(tensors: Iterable[StoredTensor], advance: Callable[[float], None] | None = None) -> list[str]:
    """Names of the tensors with a NaN or an infinity, in the order given.

    ``advance`` gets the bytes just looked at, and those of integers, which need no look.
    """
    buffer = bytearray(WINDOW)
    found = []
    for file, group in itertools.groupby(tensors, key=lambda tensor: tensor.file):
        with file.open("rb", buffering=0) as stream:
            for tensor in group:
                if tensor.dtype not in NOT_FINITE:
                    if advance:
                        advance(tensor.nbytes)
                elif _has_bad_value(stream.fileno(), tensor, buffer, advance):
                    found.append(tensor.name)
    return found


def _has_bad_value(
    descriptor: int, tensor: StoredTensor, buffer: bytearray, advance: Callable[[float], None] | None
) -> bool:
    kind, mask, limit = NOT_FINITE[tensor.dtype]
    end = tensor.offset + tensor.nbytes
    at = tensor.offset
    while at < end:
        data = _next_data(descriptor, at, end)
        # Stay on whole items: a hole may end in the middle of one.
        data -= (data - tensor.offset) % np.dtype(kind).itemsize
        size = min(WINDOW, end - data)
        if size > 0 and _read(descriptor, buffer, size, data) != size:
            raise OSError(errno.EIO, "file became shorter while it was read", str(tensor.file))
        if advance:
            advance(data + size - at)
        if size > 0 and (np.frombuffer(buffer, kind, size // np.dtype(kind).itemsize) & kind(mask)).max() >= limit:
            return True
        at = data + size
    return False


def _read(descriptor: int, buffer: bytearray, size: int, offset: int) -> int:
    done = 0
    with memoryview(buffer) as view:
        while done < size:
            got = os.preadv(descriptor, [view[done:size]], offset + done)
            if not got:
                break
            done += got
    return done


def _next_data(descriptor: int, at: int, end: int) -> int:
    """The first byte from ``at`` on that is not in a hole of a sparse file; a hole reads as zeros, which are finite."""
    if not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return min(os.lseek(descriptor, at, os.SEEK_DATA), end)
    except OSError as error:
        # ENXIO: only a hole follows. Anything else: the file system cannot tell.
        return end if error.errno == errno.ENXIO else at
