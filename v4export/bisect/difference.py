"""How far a value of one execution is from the same value of another, and how far rounding can bring it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from v4export.verify.boundary import judge
from v4export.verify.tolerance import ACCUMULATE, CONFIDENCE

#: Unit round-off of what a graph may hold. Of integers that stand for a matrix's numbers it is that of their block.
ROUNDOFF: dict[int, float] = {
    onnx.TensorProto.FLOAT: 2.0**-24,
    onnx.TensorProto.FLOAT16: 2.0**-11,
    onnx.TensorProto.BFLOAT16: 2.0**-8,
    onnx.TensorProto.FLOAT8E4M3FN: 2.0**-4,
    onnx.TensorProto.INT8: 2.0**-8,
    onnx.TensorProto.INT4: 2.0**-4,
    onnx.TensorProto.FLOAT4E2M1: 2.0**-2,
}


@dataclass(frozen=True)
class Difference:
    """Of one value.

    Attributes:
        value: its name in the reference.
        equal: no bit differs.
        ok: it is within its limit.
        rel: largest relative difference of a vector.
        limit: of ``rel`` there.
        max_abs: largest difference of one number.
        note: what is wrong, for people.
    """

    value: str
    equal: bool
    ok: bool
    rel: float = 0.0
    limit: float = 0.0
    max_abs: float = 0.0
    note: str = ""

    @property
    def excess(self) -> float:
        """How many times its limit it is; infinite where nothing may differ."""
        if self.equal:
            return 0.0
        return self.rel / self.limit if self.limit else math.inf

    def line(self) -> str:
        """For people."""
        if self.equal:
            return f"{self.value}: no bit differs"
        figures = f"max|Δ| {self.max_abs:.1e}  rel {self.rel:.1e}  (limit {self.limit:.1e})"
        return f"{self.value}: {figures}" + f"\n    {self.note}" * bool(self.note)


def expected_error(types: Iterable[int], stored: int, terms: int) -> float:
    """Relative error of a result that rounding explains, as ``v4export.verify.tolerance`` derives it.

    Args:
        types: ONNX numbers of all types that its nodes read, of which the coarsest counts.
        stored: results on the way.
        terms: lengths of the sums on the way, added up.
    """
    v = max((ROUNDOFF[one] for one in types if one in ROUNDOFF), default=ACCUMULATE)
    return math.sqrt((stored * v**2 + terms * ACCUMULATE**2) / 3)


def difference(name: str, found: np.ndarray | None, wanted: np.ndarray, error: float) -> Difference:
    """Compare a value of any shape with the reference's; of floats, vectors along the last axis.

    ``error`` is what is expected relative to a vector; anything else than floats may not differ.
    """
    if found is None or found.shape != wanted.shape:
        shape = "cannot be computed" if found is None else f"has shape {list(found.shape)}"
        return Difference(name, False, False, note=f"{shape}, the reference has shape {list(wanted.shape)}")
    if found.dtype.kind in "biu" or wanted.dtype.kind in "biu":
        wrong = np.argwhere(found != wanted)
        if not len(wrong):
            return Difference(name, True, True)
        at = tuple(int(i) for i in wrong[0])
        note = f"{len(wrong)} of {wanted.size} differ; at {list(at)} {found[at]}, the reference has {wanted[at]}"
        return Difference(name, False, False, max_abs=float(np.abs(found - wanted.astype(float)).max()), note=note)
    a, b = (np.atleast_1d(each.astype(np.float64)) for each in (found, wanted))
    if np.array_equal(a, b, equal_nan=True):
        return Difference(name, True, True)
    same = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
    rows = [torch.from_numpy(np.where(same, 0, each)).reshape(-1, each.shape[-1]) for each in (a, b)]
    allowed = CONFIDENCE * error * rows[1].norm(dim=-1)
    said = judge(name, [rows[0]], [rows[1]], [allowed], "")
    note = "; ".join(said.notes).replace("sequence 0, token ", "vector ")
    return Difference(name, False, said.ok, said.rel, said.limit, said.max_abs, note)
