"""Engram in a bundle: ``engram.json``, which says where everything is, and ``engram.map``, the compressed ids.

The tables stay where the weights are. A bundle may come from anywhere, so what these files say is believed only as far
as it fits together. Multipliers are decimal strings: they have up to 63 bits, and many readers of JSON keep 53.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4export.checkpoint.tensor import DTYPES, StoredTensor
from v4export.config import Engram
from v4export.config.hashes import LayerHash
from v4export.engram.feed import EngramFeed
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table, check_pair
from v4export.errors import BadInput
from v4export.side_files import json_value, read

DESCRIPTION, MAP = "engram.json", "engram.map"
_FORMAT = 1
_IDS = np.dtype("<i4")

#: A table's rows, and their multipliers if they have any.
Stored = tuple[StoredTensor, StoredTensor | None]


@dataclass(frozen=True)
class EngramFiles:
    """What a bundle has of Engram.

    Attributes:
        hasher: tokens to rows.
        tables: layer -> where its table lies; empty where tables are part of the graph.
    """

    hasher: Hasher
    tables: Mapping[int, Stored]

    @staticmethod
    def read(folder: Path) -> EngramFiles:
        """Read and check ``engram.json`` and ``engram.map``; of the tables, only where they lie.

        Raises:
            BadInput: a file is missing, malformed or of another version; a path leads out of the folder; sizes, shapes
                or hashes do not fit together.
        """
        try:
            return _read(folder, json_value(read(_inside(folder, DESCRIPTION))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{folder / DESCRIPTION} is not whole",
                f"{type(error).__name__}: {error}",
                "build the bundle again",
            ) from error

    def feed(self, dtype: npt.DTypeLike = np.float32, prefetch: bool = True) -> EngramFeed:
        """Open the tables; see ``EngramFeed``."""
        tables = {layer: Table(*stored, prefetch=prefetch) for layer, stored in self.tables.items()}
        return EngramFeed(self.hasher, tables, dtype)


def load_feed(folder: Path, dtype: npt.DTypeLike = np.float32, prefetch: bool = True) -> EngramFeed:
    """The feed of a bundle, its rows as ``dtype``.

    Raises:
        BadInput: see ``EngramFiles.read``.
    """
    return EngramFiles.read(folder).feed(dtype, prefetch)


def write(folder: Path, engram: Engram, token_map: np.ndarray, tables: Mapping[int, Stored]) -> None:
    """Write ``engram.json`` and ``engram.map`` into a bundle that is being built.

    Args:
        folder: the bundle.
        engram: which hashes.
        token_map: int32 [V] from ``vocabulary``.
        tables: layer -> its tensors, in files inside the folder (``weights/``); empty if they are part of the graph.

    Raises:
        BadInput: a table has not as many rows as its layer's hashes, or lies elsewhere.
    """
    hasher = Hasher.of(engram, token_map)
    ids = token_map.astype(_IDS).tobytes()
    layers = {}
    for layer, hashes in hasher.layers.items():
        data, scale = tables[layer] if tables else (None, None)
        if data:
            _check_table(layer, hashes, engram.width, data, scale)
        layers[str(layer)] = {
            "multipliers": [str(number) for number in hashes.multipliers],
            "primes": hashes.primes,
            "offsets": hashes.offsets,
            "table": data and _place(folder, data),
            "scale": scale and _place(folder, scale),
        }
    description = {
        "format": _FORMAT,
        "max_order": engram.max_order,
        "heads": engram.heads,
        "width": engram.width,
        "seed": engram.seed,
        "pad": hasher.pad,
        "compressed_vocab": engram.compressed_vocab,
        "map": {"file": MAP, "tokens": int(token_map.size), "sha256": hashlib.sha256(ids).hexdigest()},
        "layers": layers,
    }
    (folder / MAP).write_bytes(ids)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def _read(folder: Path, found: Any) -> EngramFiles:
    if found["format"] != _FORMAT:
        raise BadInput(
            f"{folder / DESCRIPTION} was made by another version",
            f"format {found['format']!r}, this reads {_FORMAT}",
            "build the bundle again",
        )
    order, heads, width = (_count(found[key], key, 2 if key == "max_order" else 1) for key in _SIZES)
    compressed = _count(found["compressed_vocab"], "compressed_vocab", 1)
    token_map = _token_map(folder, found["map"], compressed)
    pad = _count(found["pad"], "pad", 0)
    _demand(pad < compressed, f"pad {pad} is not one of {compressed} compressed ids")
    _demand(bool(found["layers"]), "there are no layers")
    layers, tables = {}, {}
    for name, entry in found["layers"].items():
        _demand(name.isdecimal() and str(int(name)) == name, f"{name!r} is not the number of a layer")
        layers[int(name)] = hashes = _hashes(entry, order, heads, compressed)
        data, scale = (entry[key] and _stored(folder, entry[key]) for key in ("table", "scale"))
        if data:
            _check_table(int(name), hashes, width, data, scale)
            tables[int(name)] = data, scale
    _demand(not tables or tables.keys() == layers.keys(), f"only layers {[*tables]} have tables")
    return EngramFiles(Hasher(token_map, pad, compressed, layers, heads), tables)


_SIZES = ("max_order", "heads", "width")


def _token_map(folder: Path, entry: Any, compressed: int) -> np.ndarray:
    ids = _inside(folder, entry["file"]).read_bytes()
    tokens = _count(entry["tokens"], "tokens", 1)
    _demand(len(ids) == tokens * _IDS.itemsize, f"{entry['file']} has {len(ids)} bytes, {tokens} tokens need four each")
    _demand(hashlib.sha256(ids).hexdigest() == entry["sha256"], f"{entry['file']} does not have the hash given for it")
    token_map = np.frombuffer(ids, _IDS).astype(np.int32)
    fits = token_map.min() >= 0 and token_map.max() < compressed
    _demand(fits, f"{entry['file']} has ids that are not 0 to {compressed - 1}")
    return token_map


def _hashes(entry: Any, order: int, heads: int, compressed: int) -> LayerHash:
    decimal = all(number.isascii() and number.isdecimal() for number in entry["multipliers"])
    _demand(decimal, "multipliers have to be strings of decimal digits")
    multipliers = tuple(int(number) for number in entry["multipliers"])
    hashes = LayerHash(multipliers, tuple(_count(prime, "a prime", 2) for prime in entry["primes"]))
    sizes = len(hashes.multipliers), len(hashes.primes)
    _demand(sizes == (order, (order - 1) * heads), f"{sizes} multipliers and primes for n-grams of 2 to {order} tokens")
    fits = all(number > 0 and number % 2 and number * (compressed - 1) < 2**63 for number in multipliers)
    _demand(fits, f"multipliers {multipliers} are not odd, or too large for {compressed} ids")
    _demand(hashes.rows < 2**63, f"{hashes.rows} rows are more than can be numbered")
    _demand(list(hashes.offsets) == entry["offsets"], "offsets are not the sums of the primes before them")
    return hashes


def _stored(folder: Path, entry: Any) -> StoredTensor:
    file = _inside(folder, entry["file"])
    shape = tuple(_count(size, "a size", 1) for size in entry["shape"])
    offset, nbytes = (_count(entry[key], key, 0) for key in ("offset", "nbytes"))
    needed, size = math.prod(shape) * DTYPES[entry["dtype"]].itemsize, file.stat().st_size
    _demand(nbytes == needed, f"{entry['name']} has {nbytes} bytes, its shape and type need {needed}")
    _demand(offset + nbytes <= size, f"{entry['name']} ends at byte {offset + nbytes}, {entry['file']} has {size}")
    return StoredTensor(str(entry["name"]), file, entry["dtype"], shape, offset, nbytes)


def _place(folder: Path, tensor: StoredTensor) -> dict[str, Any]:
    file = tensor.file.absolute()
    if not file.is_relative_to(folder.absolute()):
        raise BadInput(
            "an Engram table is not in the bundle", f"{file}, not in {folder}", "link it into weights/ first"
        )
    return {
        "name": tensor.name,
        "file": file.relative_to(folder.absolute()).as_posix(),
        "offset": tensor.offset,
        "nbytes": tensor.nbytes,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
    }


def _inside(folder: Path, name: str) -> Path:
    """A file of the bundle, by a path from its folder, which neither it nor a link may leave."""
    home, file = folder.resolve(), (folder / name).resolve()
    _demand(not Path(name).is_absolute() and file.is_relative_to(home), f"{name!r} leads out of the bundle")
    _demand(file.is_file(), f"there is no {name}")
    return file


def _check_table(layer: int, hashes: LayerHash, width: int, data: StoredTensor, scale: StoredTensor | None) -> None:
    check_pair(data, scale)
    if data.shape != (hashes.rows, width):
        raise BadInput(
            f"the Engram table of layer {layer} does not match its hashes",
            f"{data.name} is {list(data.shape)}, expected {[hashes.rows, width]}",
            "take config.json and the weights from the same checkpoint",
        )


def _count(value: Any, name: str, least: int) -> int:
    _demand(type(value) is int and value >= least, f"{name} is {value!r}, expected an integer from {least} on")
    return int(value)


def _demand(true: bool, otherwise: str) -> None:
    if not true:
        raise ValueError(otherwise)
