"""Writes what ops that choose keys share: all keys scored for every query, and the best of them.

Heads are rows of one product, and a second product runs over heads. Keys held and new keys are scored apart and never
joined.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import Body
from v4export.plugins.segment_bodies import LOWEST, Operands, Segment, Step


class Keys:
    """Writes the scores of a step's keys, the lowest float where a query cannot see one.

    Args:
        b: the body.
        node: typed, with attributes ``ratio`` and ``scale``.
        formals: q [M, H, I], weights [M, H], new keys [B, U, I], keys held [B, C, I].
        position: tokens already held by each sequence, [B].

    Attributes:
        step: of the node.
        held: scores [B, S, C]; those of keys that are not there yet are the lowest too.
        new: scores [B, S, U].
        count: C + U, as int64 [1].
    """

    def __init__(self, b: Body, node: ir.Node, formals: Sequence[ir.Value], position: ir.Value) -> None:
        q, weights, new, cache = formals
        operands, scale = Operands.of(node), node.attributes["scale"].as_float()
        self.b, self.ratio = b, b.attribute("ratio")
        batch, self._queries = b.dim(new, 0), b.dim(q, 0)
        steps = b.op("Div", self._queries, batch)
        self.step = Step(b, operands, batch, steps, position)
        self._lowest = b.const(LOWEST, np.float32)
        rows = b.reshape(operands.widen(b, q), batch, -1, operands.width)
        factors = b.reshape(weights, batch, steps, 1, operands.heads)

        def score(keys: Segment) -> ir.Value:
            product = b.op("Relu", b.op("MatMul", rows, b.op("Transpose", keys.rows, perm=[0, 2, 1])))
            product = b.reshape(product, batch, steps, operands.heads, -1)
            total = b.op("Squeeze", b.op("MatMul", factors, product), b.const([2]))
            # Scaled last, as in PyTorch: scaled weights would tell apart sums that are equal.
            scaled = b.op("Mul", total, b.const(scale, np.float32))
            return self.only(keys.visible, scaled)

        self.held, self.new = map(score, self.step.entries(new, cache, self.ratio))
        self._size, self._fresh = b.dim(cache, 1), b.dim(new, 1)
        self.count = b.op("Add", self._size, self._fresh)

    def only(self, where: ir.Value, scores: ir.Value) -> ir.Value:
        """These scores there, and the lowest elsewhere."""
        return self.b.op("Where", where, scores, self._lowest)

    def blocks(self, size: int) -> tuple[ir.Value, ir.Value]:
        """Scores by number, ``size`` numbers a block: float32 [B, S, N, size]; and N as int64 [1].

        New keys have the numbers that follow those held, and so take the places of rows that hold no key.
        """
        b, step = self.b, self.step
        blocks = b.op("Div", b.op("Add", self.count, b.const([size - 1])), b.const([size]))
        room = b.op("Sub", b.op("Mul", blocks, b.const([size])), self._size)
        rest = b.op("Expand", self._lowest, b.op("Concat", step.batch, step.steps, room, axis=0))
        held = b.op("Concat", self.held, rest, axis=-1)
        number = b.op("Add", step.held(self.ratio), b.arange(self._fresh))
        place = b.op("Expand", number, b.op("Shape", self.new))
        scores = b.op("ScatterElements", held, place, self.new, axis=-1)
        return b.reshape(scores, step.batch, step.steps, blocks, size), blocks

    def in_a_row(self, blocks: ir.Value) -> ir.Value:
        """Scores of blocks as [B, S, all of them]."""
        return self.b.reshape(blocks, self.step.batch, self.step.steps, -1)

    def best(self, scores: ir.Value, most: int, count: ir.Value) -> ir.Value:
        """Places of the best ``most`` of ``count``, by falling score [B, S, K]; -1 where a query sees fewer.

        Of equal scores TopK takes the lower place.
        """
        b = self.b
        wanted = b.op("Min", b.const([most]), count)
        best, place = b.ops("TopK", scores, wanted, outputs=2, axis=-1, largest=1, sorted=1)
        return b.op("Where", b.op("Equal", best, self._lowest), b.const(-1), place)

    def by_query(self, chosen: ir.Value, name: str) -> ir.Value:
        """The same [B, S, K] as an output [M, K]."""
        result = self.b.reshape(chosen, self._queries, self.b.dim(chosen, 2))
        result.name = name
        return result
