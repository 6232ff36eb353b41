"""Ranges that were found, experts that too few tokens chose, and the scales that come of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from v4export.calibrate.magnitudes import Magnitudes, Method
from v4export.checkpoint.formats import E4M3_MAX
from v4export.errors import NotSupported


@dataclass(frozen=True)
class Found:
    """What one scale is made of.

    Attributes:
        name: of the scale.
        each: whether it is of every expert of a layer.
        ranges: that FP8 is to cover, one, or one of every expert.
        tokens: that were seen, as many.
        borrowed: experts whose range is not their own, since fewer tokens than enough chose them.
    """

    name: str
    each: bool
    ranges: tuple[float, ...]
    tokens: tuple[int, ...]
    borrowed: tuple[int, ...] = ()

    @property
    def values(self) -> np.ndarray:
        """The scales, float32 [] or [E]. Numbers that are all zero are zero by any scale: theirs is 1."""
        ranges = np.array(self.ranges, np.float32)
        scales = np.where(ranges > 0, np.maximum(ranges / np.float32(E4M3_MAX), np.finfo(np.float32).tiny), 1)
        return scales.astype(np.float32) if self.each else scales.astype(np.float32)[0]


def found(name: str, each: bool, seen: Sequence[Magnitudes], method: Method, enough: int) -> Found:
    """From what was seen, the ranges.

    An expert that fewer than ``enough`` tokens chose borrows the largest range among its layer's experts that were
    chosen often enough, which cuts nothing off that any of them needs, or its own where that is larger; where there are
    none, the largest of all its layer's.

    Raises:
        NotSupported: a number is not finite.
    """
    if not all(np.isfinite(one.largest) for one in seen):
        raise NotSupported(
            "the model's activations are not finite",
            f"what {name} is of",
            "calibrate with another text; if that fails, too, the checkpoint is damaged",
        )
    own = [method.range(one) for one in seen]
    rare = [e for e, one in enumerate(seen) if each and one.tokens < enough]
    often = [r for e, r in enumerate(own) if e not in rare] or own
    ranges = [max(r, *often) if e in rare else r for e, r in enumerate(own)]
    return Found(name, each, tuple(ranges), tuple(one.tokens for one in seen), tuple(rare))
