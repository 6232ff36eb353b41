"""Rows as E4M3 with multipliers, number by number: the nearest of all 254 numbers, found by looking at each."""

from __future__ import annotations

import ml_dtypes
import numpy as np

CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)  # the rest are NaN
NUMBERS = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def nearest(x: float) -> float:
    """Of two that are as near, the one whose last bit is 0."""
    distance = np.abs(NUMBERS - x)
    among = [i for i in np.flatnonzero(distance == distance.min()) if NUMBERS[i] != 0 or CODES[i] == 0]
    return float(NUMBERS[min(among, key=lambda i: int(CODES[i]) & 1)])


def narrow_row(row: np.ndarray) -> tuple[list[float], list[float]]:
    """The numbers and the multipliers of one float32 row."""
    numbers, scales = [], []
    for start in range(0, len(row), 64):
        piece = row[start : start + 64]
        scale = np.float32(max(abs(x) for x in piece)) / np.float32(448)
        scale = max(scale, np.float32(2.0**-126))
        scales.append(float(scale))
        numbers += [nearest(float(np.float32(x) / scale)) for x in piece]
    return numbers, scales


def narrow(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of float32 [n, W]: float32 [n, W] and [n, ceil(W/64)]."""
    pairs = [narrow_row(row) for row in rows]
    return np.array([p[0] for p in pairs], np.float32), np.array([p[1] for p in pairs], np.float32)


def widen(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [n, W]."""
    rows = [
        [np.float32(x) * scale[i // 64] for i, x in enumerate(row)] for row, scale in zip(numbers, scales, strict=True)
    ]
    return np.array(rows, np.float32)
