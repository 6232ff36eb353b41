"""How large the numbers are that a matrix multiplies, and the range that FP8 is to cover of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import torch

from v4export.checkpoint.formats import E4M3_MAX
from v4export.errors import BadInput

#: Bits of a float32 that are left out where magnitudes are counted; 8 of its mantissa are kept, so that counts tell
#: magnitudes apart that differ by one part in 256.
_LEFT_OUT = 15
_KINDS = 1 << (31 - _LEFT_OUT)
#: Ranges that ``mse`` tries: from the largest magnitude down by eighths of an octave, as many octaves.
_TRIED = 2.0 ** (-np.arange(5 * 8 + 1) / 8)

PERCENTILE = 99.99


@dataclass
class Magnitudes:
    """Magnitudes of some numbers: whole counts, so that neither order nor portions make a difference.

    Attributes:
        counted: whether more than the largest is needed.
        tokens: vectors that were seen.
        largest: of all numbers.
        counts: by the leading bits of a magnitude, int64.
    """

    counted: bool
    tokens: int = 0
    largest: float = 0.0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, x: torch.Tensor) -> None:
        """Take in vectors, float32 [.., K]."""
        if not x.numel():
            return
        size = x.abs()
        self.tokens += x.numel() // x.shape[-1]
        # NaN is larger than everything here.
        self.largest = max(self.largest, float(size.max().nan_to_num(nan=torch.inf, posinf=torch.inf)))
        if self.counted:
            kinds = (size.view(torch.int32) >> _LEFT_OUT).flatten()
            found = torch.bincount(kinds, minlength=_KINDS).numpy()
            self.counts = self.counts + found if len(self.counts) else found


@dataclass(frozen=True)
class Method:
    """How a range is chosen.

    Attributes:
        name: of ``METHODS``.
        percentile: of magnitudes, where it goes by that.
    """

    name: str = "percentile"
    percentile: float = PERCENTILE

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise BadInput(f"unknown method {self.name!r}", f"known: {', '.join(METHODS)}", "choose one of them")
        if not 50 <= self.percentile <= 100:
            raise BadInput(f"--percentile {self.percentile:g} would cut off half of all numbers", fix="give 99 to 100")

    def watcher(self) -> Magnitudes:
        """What collects as much as the method needs."""
        return Magnitudes(counted=self.name != "max")

    def range(self, seen: Magnitudes) -> float:
        """The magnitude that is to become the largest of E4M3; 0 of numbers that are all zero."""
        if not seen.largest:
            return 0.0
        return min(METHODS[self.name](seen, self), seen.largest)

    def __str__(self) -> str:
        return f"{self.name} {self.percentile:g}" if self.name == "percentile" else self.name


def _largest(seen: Magnitudes, _: Method) -> float:
    return seen.largest


def _percentile(seen: Magnitudes, method: Method) -> float:
    """The least magnitude counted apart that so many percent of all numbers do not exceed."""
    total = np.cumsum(seen.counts)
    kind = int(np.searchsorted(total, np.ceil(total[-1] * method.percentile / 100)))
    return float(_values(np.array([kind + 1]), 0)[0])


def _least_error(seen: Magnitudes, _: Method) -> float:
    """Of the ranges that are tried the one with the least squared error of rounding, the larger of two."""
    kinds = seen.counts.nonzero()[0]
    values, counts = _values(kinds, 1 << (_LEFT_OUT - 1)), seen.counts[kinds]
    best, least = seen.largest, np.inf
    for factor in _TRIED:
        scale = np.float32(seen.largest * factor / E4M3_MAX)
        codes = np.minimum(values / scale, np.float32(E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn)
        error = float((counts * np.square(codes.astype(np.float64) * scale - values)).sum())
        if error < least:
            best, least = seen.largest * float(factor), error
    return best


def _values(kinds: np.ndarray, rest: int) -> np.ndarray:
    """Float32 magnitudes with these leading bits and the rest."""
    return ((kinds.astype(np.int32) << _LEFT_OUT) + np.int32(rest)).view(np.float32)


#: Name -> the range of some magnitudes.
METHODS: dict[str, Callable[[Magnitudes, Method], float]] = {
    "max": _largest,
    "percentile": _percentile,
    "mse": _least_error,
}
