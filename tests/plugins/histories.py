"""Sequences with a past: what a step is given of them, and attention to the same rows by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from one_node import NARROW, one_node, run, to_torch
from onnx_ir import DataType, Shape
from onnx_ir.passes import common

from v4export.graphs.passes.widen import widen


@dataclass(frozen=True)
class Past:
    """B sequences that hold ``position`` tokens and get S more.

    Attributes:
        position: int64 [B].
        S: new tokens.
        rng: fills what has no meaning.
    """

    position: np.ndarray
    S: int
    rng: np.random.Generator

    @classmethod
    def of(cls, position: Sequence[int], S: int, seed: int = 0) -> Past:
        return cls(np.array(position, np.int64), S, np.random.default_rng(seed))

    @property
    def B(self) -> int:
        return len(self.position)

    def queries(self, H: int, W: int) -> np.ndarray:
        return self.normal(self.B * self.S, H, W)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def rows(self, W: int, ratio: int = 1) -> list[np.ndarray]:
        """For each sequence a row for every ``ratio`` tokens there will be, and for those that a step may begin."""
        return [self.normal(p // ratio + -(-self.S // ratio), W) for p in self.position.tolist()]

    def held(self, rows: Sequence[np.ndarray], C: int, ratio: int = 1) -> np.ndarray:
        """[B, C, W]: rows held, then what must not be looked at."""
        held = 50 * self.normal(self.B, C, rows[0].shape[1])
        for b, count in enumerate((self.position // ratio).tolist()):
            held[b, :count] = rows[b][:count]
        return held

    def ring(self, rows: Sequence[np.ndarray], R: int, since: Sequence[int] = ()) -> np.ndarray:
        """[B, R, W]: the rows of the last R tokens held, token t at ``t % R``; none of those before ``since``."""
        ring = 50 * self.normal(self.B, R, rows[0].shape[1])
        for b, position in enumerate(self.position.tolist()):
            for t in range(max(since[b] if len(since) else 0, position - R), position):
                ring[b, t % R] = rows[b][t]
        return ring

    def new(self, rows: Sequence[np.ndarray], ratio: int = 1) -> np.ndarray:
        """[B, S or ceil(S/ratio), W]."""
        return np.stack([r[p // ratio :] for r, p in zip(rows, self.position.tolist(), strict=True)])

    def each(self) -> list[tuple[int, int, int]]:
        """(row of the queries, sequence, position) of every new token."""
        return [(b * self.S + s, b, p + s) for b, p in enumerate(self.position.tolist()) for s in range(self.S)]


def attend_by_hand(
    q: np.ndarray,
    seen: Callable[[int, int, int], Sequence[np.ndarray]],
    past: Past,
    scale: float,
    sinks: np.ndarray | None = None,
    width: int | None = None,
) -> np.ndarray:
    """Softmax over the rows ``seen(m, b, t)``, a token and a head at a time, in double precision."""
    z = np.empty((*q.shape[:2], q.shape[2] if width is None else width))
    for m, b, t in past.each():
        rows = np.stack(seen(m, b, t)).astype(np.float64)
        for h in range(q.shape[1]):
            score = scale * rows @ q[m, h].astype(np.float64)
            sink = [] if sinks is None else [float(sinks[h])]
            top = max([*score, *sink])
            p = np.exp(score - top)
            z[m, h] = p @ rows[:, :width] / (p.sum() + sum(np.exp(v - top) for v in sink))
    return z


def bodies(op_type: str, arrays: Sequence[np.ndarray], outputs: int, **attributes: Any) -> list[np.ndarray]:
    """The portable body's results; 16-bit operands are carried in float32 and rounded where the graph rounds."""
    model = one_node(op_type, arrays, outputs=outputs, **attributes)
    for i, output in enumerate(model.graph.outputs):
        if output.dtype == DataType.INT64:
            output.shape = Shape(["M", f"K{i}"])
    if any(DataType.from_numpy(array.dtype) in NARROW for array in arrays):
        common.InlinePass()(model)
        common.ShapeInferencePass()(model)
        widen(model)
    return run(model, arrays)


def body(op_type: str, arrays: Sequence[np.ndarray], **attributes: Any) -> np.ndarray:
    """The only result of ``bodies``."""
    return bodies(op_type, arrays, 1, **attributes)[0]


def eager(
    op: torch.library.CustomOpDef, arrays: Sequence[np.ndarray], optional: Sequence[np.ndarray] = (), **attributes: Any
) -> np.ndarray:
    """The op's result; ``optional`` operands stand behind its attributes."""
    out = op(*map(to_torch, arrays), *attributes.values(), *map(to_torch, optional))
    return (out.float() if out.is_floating_point() else out).numpy()


def check(
    op: torch.library.CustomOpDef,
    op_type: str,
    arrays: Sequence[np.ndarray],
    wanted: np.ndarray,
    optional: Sequence[np.ndarray] = (),
    **attributes: Any,
) -> None:
    """Op and body against the same by hand, and against each other more closely."""
    one, two = eager(op, arrays, optional, **attributes), body(op_type, [*arrays, *optional], **attributes)
    assert one.dtype == two.dtype == np.float32 and one.shape == two.shape == wanted.shape
    np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(two, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(one).max())))


def check_narrow(
    op: torch.library.CustomOpDef,
    op_type: str,
    arrays: Sequence[np.ndarray],
    dtype: type,
    keep: Sequence[int] = (),
    **attributes: Any,
) -> None:
    """16-bit operands are widened, everything is computed in float32, and only the result is rounded.

    ``keep`` has the indices of operands that are float32 whatever the others are.
    """
    rounded = [a.astype(dtype) if a.dtype == np.float32 and i not in keep else a for i, a in enumerate(arrays)]
    wide = [a.astype(np.float32) if a.dtype == dtype else a for a in rounded]
    exact = eager(op, wide, **attributes)
    step = float(ml_dtypes.finfo(dtype).eps) / 2
    for got in (eager(op, rounded, **attributes), body(op_type, rounded, **attributes)):
        assert (got.astype(dtype) == got).all()
        np.testing.assert_allclose(got, exact, rtol=1.01 * step, atol=1e-4)
