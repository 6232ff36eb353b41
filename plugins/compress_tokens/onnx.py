"""compress_tokens as ONNX: each entry's rows are looked up, key and gate apart, and pooled by a softmax over them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.segment_bodies import LOWEST

#: ``Compress`` is an operator of ONNX, which TensorRT's parser goes by whatever the domain.
OP_TYPE = "CompressTokens"
ATTRIBUTES = {"ratio": "INT", "halves": "INT"}
OUTPUTS = (first_dtype,)


def translate(rows, ring, bias, position, ratio, halves):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op."""
    return opset(DOMAIN).CompressTokens(rows, ring, bias, position, ratio=ratio, halves=halves, **PLUGIN_HINTS)


def function(node: ir.Node) -> ir.Function:
    """The body, for any ratio, halves and width: (rows [B,S,P], ring [B,R,P], bias [ratio,P/2], position [B]) ->
    entries [B,U,W]."""
    formals = [ir.val(name) for name in ("rows", "ring", "bias", "position")]

    def write(b: Body) -> list[ir.Value]:
        ratio, halves = map(b.attribute, ATTRIBUTES)
        return [_pool(b, formals, ratio, halves)]

    return make_function(OP_TYPE, formals, write, [*ATTRIBUTES, *PLUGIN_HINTS])


def _pool(b: Body, formals: list[ir.Value], ratio: ir.Value, halves: ir.Value) -> ir.Value:
    """Entries; ``ratio`` and ``halves`` are scalars."""
    rows, ring, bias, position = formals
    one, zero = b.const(1), b.const(0)
    batch, steps, kept = b.dim(rows, 0), b.dim(rows, 1), b.dim(ring, 1)
    planes = b.op("Mul", halves, b.const([2]))
    width = b.op("Div", b.dim(rows, 2), planes)
    start = b.reshape(position, -1, 1, 1)
    slot = b.arange(kept)
    half, place = b.op("Div", slot, ratio), b.op("Mod", slot, ratio)
    # The token in each slot of each entry: slots of the first of two halves belong to the entry before.
    count = b.op("Div", b.op("Sub", b.op("Add", steps, ratio), one), ratio)
    entry = b.op("Add", b.op("Div", start, ratio), b.reshape(b.arange(count), 1, -1, 1))
    owner = b.op("Sub", b.op("Add", entry, half), b.op("Sub", halves, one))
    token = b.op("Add", b.op("Mul", owner, ratio), place)
    end = b.op("Add", start, steps)
    exists = b.op("And", b.op("GreaterOrEqual", token, zero), b.op("Less", token, end))
    # Where its row stands among the ring's and the new ones. A token before the first is not negative after Max.
    new = b.op("Min", b.op("Sub", token, start), b.op("Sub", steps, one))
    old = b.op("Mod", b.op("Max", token, zero), kept)
    row = b.op("Where", b.op("Less", token, start), old, b.op("Add", new, kept))
    # Rows are cut into planes [key of each half | gate of each half], so that one Gather takes what is needed only.
    every = b.reshape(b.op("Concat", ring, rows, axis=1), -1, width)
    first = b.op("Mul", b.reshape(b.arange(batch), -1, 1, 1), b.op("Add", kept, steps))
    plane = b.op("Add", b.op("Mul", b.op("Add", row, first), planes), half)
    key = b.op("Gather", every, plane, axis=0)
    gate = b.op("Gather", every, b.op("Add", plane, halves), axis=0)
    biases = b.reshape(bias, -1, width)
    shift = b.op("Gather", biases, b.op("Add", b.op("Mul", place, halves), half), axis=0)
    score = b.op(
        "Where", b.op("Unsqueeze", exists, b.const([-1])), b.op("Add", gate, shift), b.const(LOWEST, np.float32)
    )
    weighted = b.op("Mul", b.op("Softmax", score, axis=2), key)
    entries = b.op("ReduceSum", weighted, b.const([2]), keepdims=0)
    entries.name = "entries"
    return entries
