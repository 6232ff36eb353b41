"""Writes attention over rows that stand in several segments; see ``segments.py`` for the same in PyTorch.

Segments are never joined: each is multiplied on its own, and only scores and probabilities are put side by side. So a
step reads what is cached once and copies none of it, but for rows that queries selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import Body

#: The score of what a query cannot see.
LOWEST = np.finfo(np.float32).min


@dataclass(frozen=True)
class Operands:
    """What a body bakes in of its node's queries [M, H, W].

    Attributes:
        dtype: of queries and rows.
        heads: H.
        width: W.
    """

    dtype: ir.DataType
    heads: int
    width: int

    @classmethod
    def of(cls, node: ir.Node) -> Operands:
        """From a typed node, whose first operand is the queries."""
        q = node.inputs[0]
        if q is None or q.dtype is None or q.shape is None:
            raise ValueError(f"{node.name}: the type of {node.op_type}'s operands must be known")
        return cls(q.dtype, int(q.shape[1]), int(q.shape[2]))  # type: ignore[arg-type]

    def widen(self, b: Body, value: ir.Value) -> ir.Value:
        """The same in float32."""
        return b.convert(value, self.dtype, ir.DataType.FLOAT)


@dataclass(frozen=True)
class Segment:
    """Some rows, and which queries see them.

    Attributes:
        rows: float32 [B, N, W], or [B, S, N, W] where every query has its own.
        visible: bool, broadcasting to [B, S, N].
        own: whether every query has its own.
    """

    rows: ir.Value
    visible: ir.Value
    own: bool = False


class Step:
    """Writes a step's segments, then its attention.

    Args:
        b: the body.
        operands: of its node.
        batch: B, as int64 [1].
        steps: S, as int64 [1].
        position: tokens already held by each sequence, [B]; only ``attend`` does without.
    """

    def __init__(
        self, b: Body, operands: Operands, batch: ir.Value, steps: ir.Value, position: ir.Value | None = None
    ) -> None:
        self.b, self.operands, self.batch, self.steps = b, operands, batch, steps
        if position is not None:
            self.position = b.reshape(position, -1, 1, 1)
            self.step = b.reshape(b.arange(steps), 1, -1, 1)

    def window(self, new: ir.Value, ring: ir.Value, since: ir.Value | None = None) -> list[Segment]:
        """The R newest tokens of each query: from a ring [B, R, W], token t at ``t % R``, and from the new rows.

        Of tokens before ``since`` [B] there are no rows.
        """
        b, one = self.b, self.b.const(1)
        size = b.dim(ring, 1)
        # How many tokens before the newest one held a slot's token stands; the sum is not negative, so that nothing
        # depends on how a runtime rounds quotients.
        newest = b.op("Sub", b.op("Add", self.position, size), one)
        back = b.op("Mod", b.op("Sub", newest, b.arange(size)), size)
        reach = b.op("Sub", b.op("Sub", size, one), self.step)
        there = self.position if since is None else b.op("Sub", self.position, b.reshape(since, -1, 1, 1))
        held = b.op("Less", back, b.op("Min", there, reach))
        age = b.op("Sub", self.step, b.arange(self.steps))
        fresh = b.op("And", b.op("GreaterOrEqual", age, b.const(0)), b.op("Less", age, size))
        return [self._segment(ring, held), self._segment(new, fresh)]

    def entries(self, new: ir.Value, held: ir.Value, ratio: ir.Value) -> list[Segment]:
        """All entries that are complete by a query's own token: held [B, C, W] and new [B, U, W]."""
        b = self.b
        count = self.held(ratio)
        number = b.op("Add", count, b.arange(b.dim(new, 1)))
        return [
            self._segment(held, b.op("Less", b.arange(b.dim(held, 1)), count)),
            self._segment(new, b.op("Less", number, self.complete(ratio))),
        ]

    def selected(
        self, numbers: ir.Value, new: ir.Value, cache: ir.Value, ratio: ir.Value | None = None
    ) -> list[Segment]:
        """The rows of these numbers [M, K]: held ones [B, C, W], which are gathered, and new ones [B, U, W].

        New rows are few and scored for every query; one that did not select them does not see them.
        """
        b, width, zero = self.b, self.operands.width, self.b.const(0)
        held, size, fresh = self.held(ratio), b.dim(cache, 1), b.dim(new, 1)
        number = b.op("Reshape", numbers, b.op("Concat", self.batch, self.steps, b.const([-1]), axis=0))
        is_new = b.op("GreaterOrEqual", number, held)
        marked = self.mark(b.op("Sub", number, held), is_new, fresh)
        last = b.op("Sub", size, b.const(1))
        row = b.op("Min", b.op("Max", number, zero), last)
        first = b.op("Mul", b.reshape(b.arange(self.batch), -1, 1, 1), size)
        rows = b.op("Gather", b.reshape(cache, -1, width), b.op("Add", row, first), axis=0)
        is_held = b.op("And", b.op("GreaterOrEqual", number, zero), b.op("Less", number, held))
        return [
            self._segment(new, marked),
            Segment(self.operands.widen(b, rows), is_held, own=True),
        ]

    def held(self, ratio: ir.Value | None = None) -> ir.Value:
        """Rows held, one for ``ratio`` tokens or for each: [B, 1, 1]."""
        return self.position if ratio is None else self.b.op("Div", self.position, ratio)

    def complete(self, ratio: ir.Value) -> ir.Value:
        """How many of these rows there are once a query's own token is counted: [B, S, 1]."""
        b = self.b
        return b.op("Div", b.op("Add", b.op("Add", self.position, self.step), b.const(1)), ratio)

    def mark(self, places: ir.Value, wanted: ir.Value, size: ir.Value) -> ir.Value:
        """Which of ``size`` places are among those ``wanted`` of each query's ``places`` [B, S, K]: [B, S, size]."""
        b = self.b
        # Whatever is not wanted is marked in a last column that is cut off again.
        column = b.op("Where", wanted, places, size)
        shape = b.op("Concat", self.batch, self.steps, b.op("Add", size, b.const([1])), axis=0)
        nothing = b.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
        marks = b.op("ScatterElements", nothing, column, b.cast(wanted, ir.DataType.FLOAT), axis=-1)
        return b.cast(b.op("Slice", marks, b.const([0]), size, b.const([-1])), ir.DataType.BOOL)

    def _segment(self, rows: ir.Value, visible: ir.Value) -> Segment:
        return Segment(self.operands.widen(self.b, rows), visible)

    def attend(
        self,
        q: ir.Value,
        segments: Sequence[Segment],
        scale: float,
        sinks: ir.Value | None = None,
        value_width: int | None = None,
    ) -> ir.Value:
        """z [M, H, W] in the queries' type, or its first ``value_width`` channels.

        Args:
            q: [M, H, W].
            segments: of one softmax. Every query must see a row, unless there are sinks.
            scale: factor on the scores.
            sinks: [H] scores that have no value.
            value_width: all unless given.
        """
        b, heads, width = self.b, self.operands.heads, self.operands.width
        scaled = b.op("Mul", self.operands.widen(b, q), b.const(scale, np.float32))
        # A shared segment is multiplied by the heads of all queries of a sequence as rows of one matrix.
        rows_of = {False: b.reshape(scaled, self.batch, -1, width)}
        if any(segment.own for segment in segments):
            rows_of[True] = b.reshape(scaled, self.batch, self.steps, heads, width)
        lowest, axis = b.const(LOWEST, np.float32), b.const([2])
        scores = []
        for segment in segments:
            turned = b.op("Transpose", segment.rows, perm=[0, 1, 3, 2] if segment.own else [0, 2, 1])
            score = b.op("MatMul", rows_of[segment.own], turned)
            if not segment.own:
                score = b.reshape(score, self.batch, self.steps, heads, -1)
            scores.append(b.op("Where", b.op("Unsqueeze", segment.visible, axis), score, lowest))
        if sinks is not None:
            shape = b.op("Concat", self.batch, self.steps, b.const([heads, 1]), axis=0)
            scores.append(b.op("Expand", b.reshape(sinks, heads, 1), shape))
        p = b.op("Softmax", b.op("Concat", *scores, axis=-1), axis=-1)
        z = self._mix(p, segments)
        if value_width is not None:
            z = b.op("Slice", z, b.const([0]), b.const([value_width]), b.const([-1]))
        z = b.convert(z, ir.DataType.FLOAT, self.operands.dtype)
        z.name = "z"
        return z

    def _mix(self, p: ir.Value, segments: Sequence[Segment]) -> ir.Value:
        """The segments' rows [M, H, W] weighted by their columns of p [B, S, H, all of them, ...]."""
        b, heads, width = self.b, self.operands.heads, self.operands.width
        last, start = b.const([-1]), b.const([0])
        flat = b.op("Mul", self.steps, b.const([heads]))
        sums: dict[bool, ir.Value] = {}
        for segment in segments:
            end = b.op("Add", start, b.dim(segment.rows, -2))
            share = b.op("Slice", p, start, end, last)
            if not segment.own:
                share = b.reshape(share, self.batch, flat, -1)
            mixed = b.op("MatMul", share, segment.rows)
            sums[segment.own] = b.op("Add", sums[segment.own], mixed) if segment.own in sums else mixed
            start = end
        parts = [b.reshape(part, -1, heads, width) for part in sums.values()]
        return parts[0] if len(parts) == 1 else b.op("Add", *parts)
