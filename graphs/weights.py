"""Where the graph's weights lie: in the checkpoint's own bytes where those are right, written once where they are not.

A file that is pointed at appears in ``OUT/weights`` as a hard link to the shard (onnxruntime refuses paths and symbolic
links that leave the model's folder), or as a copy where the file system cannot link.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.formats import grid
from v4export.checkpoint.names import SCALE
from v4export.checkpoint.narrow import Narrow, narrow, outer_scale
from v4export.checkpoint.tensor import StoredTensor
from v4export.errors import BadInput, NotSupported
from v4export.graphs.shards import EXPONENTS, FOLDER, SAFETENSORS_NAMES, Conversion, Placed, numpy_dtype, write
from v4export.precision import Format, Precision, module_path
from v4export.units import At, Units, content

#: How the names of the files begin that hold converted tensors.
CONVERTED = "converted"
#: What a weight's name is followed by for the multiplier of its multipliers.
SCALE_2 = "_scale_2"

#: Rows converted at a time; a multiple of every block height.
_WINDOW_ROWS = 1024


@dataclass(frozen=True)
class Placement:
    """All initialisers of a graph and what it cost to have them.

    Attributes:
        tensors: by canonical name; multipliers under their weight's name plus ``_scale_inv``, theirs plus ``_scale_2``.
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

    @property
    def digest(self) -> str:
        """A hash of where everything lies, of which there may be a hundred thousand tensors."""
        found = hashlib.sha256()
        for t in self.tensors.values():
            found.update(f"{t.name} {t.location} {t.offset} {t.nbytes} {t.dtype} {t.shape}\n".encode())
        return found.hexdigest()


def place(
    weights: Iterable[Weight],
    precision: Precision,
    out: Path,
    *,
    beside: Mapping[str, StoredTensor] | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    copy: bool = False,
    advance: Callable[[float], None] = lambda _: None,
    units: Units | None = None,
) -> Placement:
    """Point at what is right, convert what is not.

    Args:
        weights: what the graph needs, in reading order.
        precision: decides each weight's format.
        out: folder of the graph; its subfolder ``weights`` is filled.
        beside: tensors that the graph does not hold and whoever runs it reads, by name.
        scales: by which inputs are rounded, by name.
        copy: copy source shards even where they could be linked; ``onnx.checker`` refuses hard links.
        advance: told the bytes written.
        units: what is finished of the build.

    Raises:
        BadInput: a value does not fit the dtype asked for.
        NotSupported: rows are not a whole number of a format's blocks.
    """
    pointed: list[tuple[str, StoredTensor]] = []
    conversions: list[Conversion] = []
    for weight in weights:
        kept, converted = decide(weight, precision)
        pointed += kept
        conversions += converted
    conversions += as_conversions(scales or {})
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    beside, units = beside or {}, units or Units(out)
    needed = {tensor.file for tensor in (*(t for _, t in pointed), *beside.values())}
    links = _bring(sorted(needed), out / FOLDER, copy, units)
    tensors = {
        name: Placed(name, f"{FOLDER}/{links[t.file]}", t.offset, t.nbytes, _dtype_name(t), t.shape)
        for name, t in pointed
    }
    tensors |= write(conversions, units, CONVERTED, advance)
    return Placement(
        tensors,
        tuple(links.values()),
        {name: dataclasses.replace(t, file=out / FOLDER / links[t.file]) for name, t in beside.items()},
        sum(t.nbytes for _, t in pointed),
        sum(c.nbytes for c in conversions),
    )


def as_conversions(scales: Mapping[str, np.ndarray]) -> list[Conversion]:
    """Scales of inputs, which no checkpoint has, as what is written."""

    def one(name: str, scale: np.ndarray) -> Conversion:
        values = scale.astype(np.float32)
        return Conversion(name, "float32", scale.shape, lambda: iter([values]), lambda: values.tobytes().hex())

    return [one(name, scale) for name, scale in scales.items()]


def stored_as(weight: Weight, format: Format) -> bool:
    """Whether a weight's bytes are those of a format."""
    if weight.scale is None or not format.scaled:
        return weight.scale is None and not format.scaled and weight.data.dtype == SAFETENSORS_NAMES[format.dtype]
    stored = "float4_e2m1fn" if weight.packed else "float8_e4m3fn"
    return (stored, weight.block, False) == (format.dtype, format.block, format.outer)


def decide(weight: Weight, precision: Precision) -> tuple[list[tuple[str, StoredTensor]], list[Conversion]]:
    """Which stored tensors serve as they are, and what has to be written, for one weight.

    Packed bytes that serve as they are get the shape of their numbers, and ``F4`` for a dtype.

    Raises:
        NotSupported: rows are not a whole number of the format's blocks.
    """
    format = precision.format_of(weight.name, weight.role)
    depends = functools.cache(lambda: _sources(weight, format))
    if stored_as(weight, format):
        if weight.columns is not None:
            return [], _some_columns(weight, format, depends)
        data, scale = weight.data, weight.scale
        if weight.packed:
            data = dataclasses.replace(data, dtype=SAFETENSORS_NAMES[format.dtype], shape=weight.shape)
        kept = [(_named(weight), data)]
        if scale is None:
            return kept, []
        dtype, name = _multipliers(weight, format), _named(weight, SCALE)
        if dtype == EXPONENTS:
            scale = dataclasses.replace(scale, dtype=SAFETENSORS_NAMES[dtype])
        if scale.dtype == SAFETENSORS_NAMES[dtype]:
            return [*kept, (name, scale)], []
        to = numpy_dtype(dtype)
        return kept, [
            Conversion(name, dtype, scale.shape, lambda: iter([scale.read().astype(to)]), lambda: _content(scale))
        ]
    if format.scaled:
        return [], _narrowed(weight, format, depends)
    cast = Conversion(_named(weight), format.dtype, weight.shape, lambda: _cast_rows(weight, format.dtype), depends)
    return [], [cast]


def _multipliers(weight: Weight, format: Format) -> str:
    """dtype of the multipliers, in a graph, of a weight that is stored in a format.

    Those of experts are a sixteenth of a large checkpoint: powers of two stay the bytes of their exponents.
    """
    assert weight.scale is not None
    as_they_are = weight.role == "expert" and format.power_of_two and weight.scale.dtype == "F8_E8M0"
    return EXPONENTS if as_they_are else format.scale


def _sources(weight: Weight, format: Format) -> Any:
    """All that a weight's bytes in a format follow from; the format as text, since there may be a hundred thousand."""
    scale = weight.scale and _content(weight.scale)
    return repr(format), weight.block, weight.role, weight.columns, _content(weight.data), scale


def _content(tensor: StoredTensor) -> Any:
    return tensor.dtype, tensor.shape, content(tensor.file, tensor.offset, tensor.nbytes)


def _named(weight: Weight, which: str = "") -> str:
    """Name of a weight's numbers, or of its multipliers, among placed tensors."""
    return f"{weight.name}{which}{weight.piece}"


def as_a_rank_names(placed: Mapping[str, Any], weights: Iterable[Weight]) -> dict[str, Any]:
    """Of what there is of many pieces that of some, under the names of whole weights."""
    keys = {f"{w.name}{which}": _named(w, which) for w in weights for which in ("", SCALE, SCALE_2)}
    return {whole: placed[key] for whole, key in keys.items() if key in placed}


def _some_columns(weight: Weight, format: Format, depends: Callable[[], Any]) -> list[Conversion]:
    """Some columns of a weight that has the format, as they are: its numbers, and its multipliers if there are any."""
    assert weight.columns is not None
    start, stop = weight.columns
    each = 2 if weight.packed else 1

    def numbers() -> Iterator[np.ndarray]:
        for first in range(0, weight.shape[0], _WINDOW_ROWS):
            window = weight.data.part0(first, min(first + _WINDOW_ROWS, weight.shape[0])).read()
            yield window[:, start // each : stop // each]

    found = [Conversion(_named(weight), format.dtype, weight.shape, numbers, depends)]
    if scale := weight.scale:
        some = slice(start // weight.block[1], -(-stop // weight.block[1]))
        shape, dtype = (scale.shape[0], some.stop - some.start), _multipliers(weight, format)

        def scales() -> Iterator[np.ndarray]:
            columns = scale.read()[:, some]
            yield columns.view(np.uint8) if dtype == EXPONENTS else columns.astype(numpy_dtype(dtype))

        found.append(Conversion(_named(weight, SCALE), dtype, shape, scales, depends))
    return found


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


def _narrowed(weight: Weight, format: Format, depends: Callable[[], Any]) -> list[Conversion]:
    """The weight in a format that has multipliers: numbers, multipliers and theirs, each computed window by window."""
    rows, width = weight.shape
    if not format.fits(width):
        assert format.block is not None
        raise NotSupported(
            f"{weight.name} cannot be stored as {format.name}",
            f"{width} columns, and {format.block[1]} share a multiplier",
            f"keep it: --keep 'bf16:{module_path(weight.name)}', or choose another precision",
        )
    assert format.block is not None
    if weight.piece and (rows % format.block[0] or width % format.columns(width)):
        raise NotSupported(
            f"a rank's part of {weight.name} cannot be stored as {format.name}",
            f"{rows} x {width}, in blocks of {format.block[0]} x {format.columns(width)}",
            f"keep it: --keep 'bf16:{module_path(weight.name)}', or take fewer ranks",
        )
    scale_2 = functools.cache(lambda: outer_scale(max(float(np.abs(w).max()) for w in _windows(weight))))
    # By window: numbers are written first, and multipliers, which are few, wait for their turn.
    waiting: dict[int, np.ndarray] = {}

    def converted(w: np.ndarray) -> Narrow:
        return narrow(w, format, scale_2() if format.outer else None)

    def numbers() -> Iterator[np.ndarray]:
        for window, w in enumerate(_windows(weight)):
            made = converted(w)
            waiting[window] = made.scale
            yield made.numbers

    def scales() -> Iterator[np.ndarray]:
        for window in range(-(-rows // _WINDOW_ROWS)):
            made = waiting.pop(window, None)
            yield converted(_window(weight, window)).scale if made is None else made

    multipliers = grid((rows, width), (format.block[0], format.columns(width)))
    found = [
        Conversion(_named(weight), format.dtype, weight.shape, numbers, depends),
        Conversion(_named(weight, SCALE), format.scale, multipliers, scales, depends),
    ]
    if format.outer:
        found.append(Conversion(_named(weight, SCALE_2), "float32", (1, 1), lambda: iter([scale_2()]), depends))
    return found


def _windows(weight: Weight) -> Iterator[np.ndarray]:
    """The weight's values as ``Weight.decode`` gives them, some rows at a time."""
    return (_window(weight, number) for number in range(-(-weight.shape[0] // _WINDOW_ROWS)))


def _window(weight: Weight, number: int) -> np.ndarray:
    start, height = number * _WINDOW_ROWS, weight.block[0]
    stop = min(start + _WINDOW_ROWS, weight.shape[0])
    scale = weight.scale and weight.scale.part0(start // height, -(-stop // height))
    return dataclasses.replace(weight, data=weight.data.part0(start, stop), scale=scale).decode()


def _dtype_name(tensor: StoredTensor) -> str:
    return next(name for name, spelled in SAFETENSORS_NAMES.items() if spelled == tensor.dtype)


def _bring(files: Sequence[Path], folder: Path, copy: bool, units: Units) -> dict[Path, str]:
    """Each source shard in ``folder``: a hard link or, where asked or across file systems, a copy; its name there."""
    for file in files:
        try:
            if copy:
                raise OSError
            os.link(file.resolve(), folder / file.name)
        except OSError:
            _copy(file, f"{FOLDER}/{file.name}", units)
    return {file: file.name for file in files}


def _copy(file: Path, location: str, units: Units) -> None:
    """A copy that a later build takes as long as its source has not been written to."""
    status = file.stat()

    def copied(at: At) -> bool:
        shutil.copyfile(file, at(location))
        return True

    units.once(location, [status.st_size, status.st_mtime_ns, status.st_ino], bool, copied)
