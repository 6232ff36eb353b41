"""Bytes of a graph's weights, in the graph or in files beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from v4export.errors import BadInput

#: Bytes that are compared at a time.
_WINDOW = 1 << 26


def same_bytes(one: onnx.TensorProto, folder: Path, another: onnx.TensorProto, its_folder: Path) -> bool:
    """Whether two initialisers hold the same; those of the same place in the same file are not read."""
    if (one.data_type, list(one.dims)) != (another.data_type, list(another.dims)):
        return False
    place = _place(one, folder)
    if place is not None and place == _place(another, its_folder):
        return True
    ours, theirs = read_bytes(one, folder), read_bytes(another, its_folder)
    return ours.size == theirs.size and all(
        np.array_equal(ours[i : i + _WINDOW], theirs[i : i + _WINDOW]) for i in range(0, ours.size, _WINDOW)
    )


def read_bytes(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """An initialiser's bytes as uint8, of a file not before they are used.

    Raises:
        BadInput: they are not in the folder.
    """
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
    file, offset, length = _external(tensor, folder)
    return np.memmap(file, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)


def embedded(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy with its weights inside. onnx itself refuses to read files that are hard links, as a bundle's are."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.raw_data = read_bytes(tensor, folder).tobytes()
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return copy


def _external(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    where = {entry.key: entry.value for entry in tensor.external_data}
    file = (folder / where.get("location", "")).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise BadInput(f"weight {tensor.name} is not in {folder}", where.get("location", ""), "make the folder whole")
    offset, size = int(where.get("offset", 0)), file.stat().st_size
    length = int(where.get("length", size - offset))
    if not 0 <= offset <= offset + length <= size:
        values = f"{offset} + {length} of {size} bytes"
        raise BadInput(f"weight {tensor.name} is beyond {file}", values, "make the file whole")
    return file, offset, length


def _place(tensor: onnx.TensorProto, folder: Path) -> tuple[int, ...] | None:
    """Where its bytes lie; the same for links to the same file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    file, offset, length = _external(tensor, folder)
    facts = file.stat()
    return facts.st_dev, facts.st_ino, offset, length
