"""Where the graph's weights lie: in the checkpoint's own bytes where those are right, written once where they are not.

A file that is pointed at appears in ``OUT/weights`` as a hard link to the shard (onnxruntime refuses paths and symbolic
links that leave the model's folder), or as a copy where the file system cannot link.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.formats import FP4_BLOCK, grid, quantize_blocks, quantize_fp4
from v4export.checkpoint.names import SCALE
from v4export.checkpoint.tensor import DTYPES, StoredTensor
from v4export.errors import BadInput, NotSupported
from v4export.precision import Precision

FOLDER = "weights"
FP4 = "float4_e2m1fn"
#: Multipliers of FP4 numbers in a graph: bfloat16 has every power of two that E8M0 has, and TensorRT-RTX reads it.
FP4_SCALE = "bfloat16"

#: safetensors' spelling of the dtypes a graph can hold. ``F4`` is two numbers a byte, which files declare as bytes.
SAFETENSORS_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    FP4: "F4",
    "int64": "I64",
}


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a graph dtype's name; FP4 numbers are single ones."""
    return np.dtype(ml_dtypes.float4_e2m1fn) if name == FP4 else DTYPES[SAFETENSORS_NAMES[name]]


_SHARD_BYTES = 5 << 30
#: Rows converted at a time; a multiple of every block height.
_WINDOW_ROWS = 1024


@dataclass(frozen=True)
class Placed:
    """One initialiser's bytes: ``location`` is relative to OUT, ``offset`` and ``nbytes`` are in bytes.

    ``shape`` is in numbers, of which FP4 has two a byte.
    """

    name: str
    location: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """All initialisers of a graph and what it cost to have them.

    Attributes:
        tensors: by canonical name; multipliers under their weight's name plus ``_scale_inv``.
        linked: source shards that OUT/weights shares with the checkpoint.
        beside: the tensors that were to be there without being part of the graph, where they now lie.
        pointed_bytes: bytes used where they lie.
        written_bytes: bytes converted and written.
    """

    tensors: dict[str, Placed]
    linked: tuple[str, ...]
    beside: dict[str, StoredTensor]
    pointed_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Conversion:
    """A tensor to write: its dtype and shape, and its rows in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes once written."""
        numbers = int(np.prod(self.shape))
        return numbers // 2 if self.dtype == FP4 else numbers * numpy_dtype(self.dtype).itemsize

    @property
    def declared(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape in the header of the file: FP4 numbers are declared as the bytes they are packed in."""
        if self.dtype == FP4:
            return "U8", (*self.shape[:-1], self.shape[-1] // 2)
        return SAFETENSORS_NAMES[self.dtype], self.shape


def place(
    weights: Iterable[Weight],
    precision: Precision,
    out: Path,
    *,
    beside: Mapping[str, StoredTensor] | None = None,
    copy: bool = False,
    advance: Callable[[float], None] = lambda _: None,
) -> Placement:
    """Point at what is right, convert what is not.

    Args:
        weights: what the graph needs, in reading order.
        precision: decides each weight's dtype by its role.
        out: folder of the graph; its subfolder ``weights`` is filled.
        beside: tensors that the graph does not hold and whoever runs it reads, by name.
        copy: copy source shards even where they could be linked; ``onnx.checker`` refuses hard links.
        advance: told the bytes written.

    Raises:
        BadInput: a value does not fit the dtype asked for.
        NotSupported: FP4 is asked for, and rows are not a whole number of its blocks.
    """
    pointed: list[tuple[str, StoredTensor]] = []
    conversions: list[Conversion] = []
    for weight in weights:
        kept, converted = decide(weight, precision)
        pointed += kept
        conversions += converted
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    beside = beside or {}
    needed = {tensor.file for tensor in (*(t for _, t in pointed), *beside.values())}
    links = _bring(sorted(needed), out / FOLDER, copy)
    tensors = {
        name: Placed(name, f"{FOLDER}/{links[t.file]}", t.offset, t.nbytes, _dtype_name(t), t.shape)
        for name, t in pointed
    }
    for number, shard in enumerate(_shards(conversions), 1):
        tensors |= _write(shard, out, f"{FOLDER}/converted-{number:05}.safetensors", advance)
    return Placement(
        tensors,
        tuple(links.values()),
        {name: dataclasses.replace(t, file=out / FOLDER / links[t.file]) for name, t in beside.items()},
        sum(t.nbytes for _, t in pointed),
        sum(c.nbytes for c in conversions),
    )


def stored_as(weight: Weight, dtype: str) -> bool:
    """Whether a weight's bytes are those of a graph's dtype."""
    return weight.packed if dtype == FP4 else weight.data.dtype == SAFETENSORS_NAMES[dtype]


def decide(weight: Weight, precision: Precision) -> tuple[list[tuple[str, StoredTensor]], list[Conversion]]:
    """Which stored tensors serve as they are, and what has to be written, for one weight.

    Packed FP4 bytes that serve as they are get the shape of their numbers, and ``F4`` for a dtype.

    Raises:
        NotSupported: the precision has FP4 experts, whose rows are not a whole number of blocks.
    """
    dtype = precision.weight_dtype(weight.role)
    if stored_as(weight, dtype):
        data, scale = weight.data, weight.scale
        if weight.packed:
            data = dataclasses.replace(data, dtype=SAFETENSORS_NAMES[FP4], shape=weight.shape)
        kept = [(weight.name, data)]
        wide = FP4_SCALE if weight.packed else "float32"
        if scale is None:
            return kept, []
        if scale.dtype == SAFETENSORS_NAMES[wide]:
            return [*kept, (weight.name + SCALE, scale)], []
        to = numpy_dtype(wide)
        return kept, [Conversion(weight.name + SCALE, wide, scale.shape, lambda: iter([scale.read().astype(to)]))]
    if dtype == FP4:
        return [], _packed(weight)
    if dtype == "float8_e4m3fn":
        return [], _quantised(weight, precision)
    return [], [Conversion(weight.name, dtype, weight.shape, lambda: _cast_rows(weight, dtype))]


def _cast_rows(weight: Weight, dtype: str) -> Iterator[np.ndarray]:
    """The weight's rows in another dtype; an overflow is an error, never an infinity."""
    for rows in _windows(weight):
        if dtype == "int64":
            yield rows
            continue
        with np.errstate(over="ignore"):
            cast = rows.astype(numpy_dtype(dtype))
        if not np.isfinite(cast.astype(np.float32)).all():
            raise BadInput(
                f"{weight.name} does not fit {dtype}",
                f"largest magnitude {np.abs(rows).max():.6g}",
                "choose --precision bf16 or fp32",
            )
        yield cast


def _quantised(weight: Weight, precision: Precision) -> list[Conversion]:
    """The weight in FP8 blocks: its bytes and its multipliers, each computed window by window."""
    fp8 = precision.fp8
    assert fp8 is not None
    multipliers = grid(weight.shape, (fp8.rows, fp8.columns))

    def part(index: int) -> Iterator[np.ndarray]:
        for rows in _windows(weight):
            yield quantize_blocks(rows, fp8.rows, fp8.columns, power_of_two=fp8.power_of_two)[index]

    return [
        Conversion(weight.name, "float8_e4m3fn", weight.shape, lambda: part(0)),
        Conversion(weight.name + SCALE, "float32", multipliers, lambda: part(1)),
    ]


def _packed(weight: Weight) -> list[Conversion]:
    """The weight as packed FP4: its bytes and its multipliers, each computed window by window."""
    if weight.shape[1] % FP4_BLOCK[1]:
        raise NotSupported(
            f"{weight.name} cannot be stored as FP4",
            f"{weight.shape[1]} columns, and {FP4_BLOCK[1]} share a multiplier",
            "choose another precision",
        )

    def multipliers() -> Iterator[np.ndarray]:
        return (quantize_fp4(rows)[1].astype(numpy_dtype(FP4_SCALE)) for rows in _windows(weight))

    return [
        Conversion(weight.name, FP4, weight.shape, lambda: (quantize_fp4(rows)[0] for rows in _windows(weight))),
        Conversion(weight.name + SCALE, FP4_SCALE, grid(weight.shape, FP4_BLOCK), multipliers),
    ]


def _windows(weight: Weight) -> Iterator[np.ndarray]:
    """The weight's values as ``Weight.decode`` gives them, some rows at a time."""
    for start in range(0, weight.shape[0], _WINDOW_ROWS):
        stop = min(start + _WINDOW_ROWS, weight.shape[0])
        height = weight.block[0]
        scale = weight.scale and weight.scale.part0(start // height, -(-stop // height))
        yield dataclasses.replace(weight, data=weight.data.part0(start, stop), scale=scale).decode()


def _dtype_name(tensor: StoredTensor) -> str:
    return next(name for name, spelled in SAFETENSORS_NAMES.items() if spelled == tensor.dtype)


def _bring(files: Sequence[Path], folder: Path, copy: bool) -> dict[Path, str]:
    """Each source shard in ``folder``: a hard link or, where asked or across file systems, a copy; its name there."""
    for file in files:
        try:
            if copy:
                raise OSError
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    return {file: file.name for file in files}


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


def _write(
    conversions: Sequence[Conversion], out: Path, location: str, advance: Callable[[float], None]
) -> dict[str, Placed]:
    """One safetensors file, streamed. The library's writer wants all tensors in memory, so the header is made here."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for c in conversions:
        dtype, shape = c.declared
        header[c.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + c.nbytes]}
        end += c.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    base, placed = 8 + len(text), {}
    with open(out / location, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for c in conversions:
            offset = file.tell()
            for rows in c.rows():
                file.write(np.ascontiguousarray(rows).view(np.uint8).data)
                advance(rows.nbytes)
            placed[c.name] = Placed(c.name, location, offset, c.nbytes, c.dtype, c.shape)
        assert file.tell() == base + end
    return placed
