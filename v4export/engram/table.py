"""A table of Engram rows in its file: FP8 E4M3 with a power of two per 32 columns, or a plain float type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from v4export.checkpoint.formats import FP8_ROW, decode
from v4export.checkpoint.tensor import DTYPES, StoredTensor
from v4export.config.hashes import NO_ROW
from v4export.engram.storage import StoredRows, corrupt
from v4export.errors import BadInput

COLUMNS = FP8_ROW[1]  # that share a multiplier
# Data type -> that of its multipliers, if it has any.
SCALE_OF = {"F8_E4M3": "F8_E8M0", "BF16": None, "F16": None, "F32": None}
_CHUNK = 1024  # rows decoded at a time, which a cache holds

# [65536, 2]: the values of two bytes; half as many look-ups as one by one, for a table that a cache still holds.
_PAIRS = decode(np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.float8_e4m3fn)).reshape(-1, 2)


class Table:
    """Rows of a table, decoded after they are found. Threads may share one.

    Args:
        data: [rows, width].
        scale: [rows, width / 32] E8M0 where data is E4M3, else None.
        prefetch: ask for all rows before reading the first. It costs little where they are in memory already.

    Raises:
        BadInput: types or shapes do not fit together, or a file is missing or too short.
    """

    def __init__(self, data: StoredTensor, scale: StoredTensor | None = None, prefetch: bool = True) -> None:
        check_pair(data, scale)
        self.rows, self.width = data.shape
        self._data = StoredRows(data, prefetch)
        self._scale = StoredRows(scale, prefetch) if scale else None

    def gather(self, rows: np.ndarray, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        """Rows by their numbers. A number that occurs several times is read once.

        Args:
            rows: int64 [...]; ``NO_ROW`` is a row of zeros.
            dtype: float32, float16 or bfloat16 of ml_dtypes. Rounded once, to the nearest, ties to even.

        Returns:
            [..., width].

        Raises:
            BadInput: a number is not in the table; or the table is corrupt: the file is too short, or a row holds what
                is not a finite number of ``dtype``.
        """
        wanted, places = np.unique(rows, return_inverse=True)
        if wanted.size and (wanted[0] < NO_ROW or wanted[-1] >= self.rows):
            wrong = wanted[(wanted < NO_ROW) | (wanted >= self.rows)]
            raise BadInput(
                "rows are not in the Engram table",
                f"{', '.join(map(str, wrong[:5]))}; {self._data.tensor.name} has rows 0 to {self.rows - 1}",
                "take config.json, tokenizer.json and the tables from the same checkpoint",
            )
        real = wanted[wanted != NO_ROW]
        for stored in (self._data, self._scale):
            if stored:
                stored.ask_for(real)
        codes = self._read(self._data, wanted, real)
        scales = self._read(self._scale, wanted, real) if self._scale else None
        flat, places = np.ravel(rows), places.ravel()
        out = np.empty((flat.size, self.width), dtype)
        for begin in range(0, flat.size, _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            values = self._decode(codes[places[chunk]], None if scales is None else scales[places[chunk]])
            self._check(values, flat[chunk], out.dtype)
            out[chunk] = values
        return out.reshape(*np.shape(rows), self.width)

    def close(self) -> None:
        """Close the files; what else the table does fails from then on."""
        for stored in (self._data, self._scale):
            if stored:
                stored.close()

    @staticmethod
    def _read(stored: StoredRows, wanted: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Bytes [n, of a row]. Zero bytes are zero in every format, whatever the multiplier."""
        data = bytes(stored.row_bytes * (wanted.size - real.size)) + stored.read(real)
        return np.frombuffer(data, np.uint8).reshape(wanted.size, stored.row_bytes)

    def _decode(self, codes: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        if scales is None:
            return decode(codes.view(DTYPES[self._data.tensor.dtype]))
        values = np.take(_PAIRS, codes.view(np.uint16), axis=0).reshape(len(codes), -1, COLUMNS)
        with np.errstate(over="ignore"):  # found and reported afterwards
            values *= decode(scales.view(ml_dtypes.float8_e8m0fnu))[:, :, None]
        return values.reshape(len(codes), self.width)

    def _check(self, values: np.ndarray, rows: np.ndarray, dtype: np.dtype) -> None:
        limit = float(ml_dtypes.finfo(dtype).max)
        if max(values.max(), -values.min()) <= limit:  # false with NaN
            return
        row, column = np.argwhere(~(np.abs(values) <= limit))[0]
        found = f"row {rows[row]}, column {column} is {values[row, column]}"
        if np.isfinite(values[row, column]):
            raise BadInput(
                "a row of an Engram table is out of the range of its type",
                f"{self._data.tensor.name}: {found}, {dtype} ends at {limit:.4g}",
                "choose another precision",
            )
        raise corrupt(self._data.tensor, found)


def check_pair(data: StoredTensor, scale: StoredTensor | None) -> None:
    """Whether a tensor and its multipliers are a table.

    Raises:
        BadInput: they are not.
    """
    wanted = SCALE_OF.get(data.dtype)
    fits = data.dtype in SCALE_OF and len(data.shape) == 2 and min(data.shape) > 0
    if fits and wanted:
        shape = (data.shape[0], data.shape[1] // COLUMNS)
        fits = scale is not None and scale.dtype == wanted and scale.shape == shape and data.shape[1] % COLUMNS == 0
    elif fits:
        fits = scale is None
    if not fits:
        found = f"{data.name} {data.dtype} {list(data.shape)}"
        found += f" with multipliers {scale.dtype} {list(scale.shape)}" if scale else " without multipliers"
        raise BadInput(
            "a tensor is not an Engram table",
            found,
            f"expected F8_E4M3 [rows, width] with F8_E8M0 [rows, width / {COLUMNS}], or BF16, F16 or F32 without",
        )
