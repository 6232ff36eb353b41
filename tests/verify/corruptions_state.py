"""Damages to graphs that keep cached rows as E4M3: multipliers wrong, missing or another's; rows not rounded."""

from __future__ import annotations

import numpy as np
import onnx
from corruptions import Case, Damage
from corruptions_v4 import constant
from damaged import Damaged
from onnx import helper

LAYER = 1
HELD, NEW = f"state.{LAYER}.latent", f"new_state.{LAYER}.latent"


def made(d: Damaged, value: str) -> onnx.NodeProto:
    """The node that makes a value."""
    return next(n for n in d.model.graph.node if value in n.output)


def ahead(d: Damaged, value: str, op_type: str) -> onnx.NodeProto:
    """The nearest node of a type before a value, by first inputs."""
    node = made(d, value)
    return node if node.op_type == op_type else ahead(d, node.input[0], op_type)


def behind(d: Damaged, value: str, op_type: str) -> onnx.NodeProto:
    """The nearest node of a type after a value that only one node reads, or that DequantizeLinear does."""
    readers = [n for n in d.model.graph.node if value in n.input]
    node = next((n for n in readers if n.op_type == "DequantizeLinear"), readers[0])
    return node if node.op_type == op_type else behind(d, node.output[0], op_type)


def left_out(node: onnx.NodeProto) -> None:
    """What goes into it comes out."""
    node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name))


def insert(d: Damaged, before: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
    at = next(i for i, n in enumerate(d.model.graph.node) if n.name == before.name)
    for node in reversed(nodes):
        d.model.graph.node.insert(at, node)


def cached_rows_are_not_multiplied(d: Damaged) -> None:
    left_out(behind(d, HELD, "Mul"))


def new_rows_are_read_without_multipliers(d: Damaged) -> None:
    left_out(behind(d, NEW, "Mul"))


def rows_are_kept_undivided(d: Damaged) -> None:
    left_out(ahead(d, NEW, "Div"))


def no_multipliers(d: Damaged) -> None:
    """All of them are 1, with which everything agrees."""
    node = made(d, NEW + "_scale")
    one = constant(d, np.array(1, np.float32))
    size = helper.make_node("Shape", [node.input[0]], ["damaged_size"], name="damaged_size")
    insert(d, node, size)
    node.CopyFrom(helper.make_node("Expand", [one, "damaged_size"], list(node.output), name=node.name))


def largest(value: float) -> Damage:
    """Multipliers are max|x| over another number; everything agrees with them."""

    def damage(d: Damaged) -> None:
        ahead(d, NEW + "_scale", "Div").input[1] = constant(d, np.array(value, np.float32))

    return damage


def multipliers_are_kept_in_another_order(d: Damaged) -> None:
    """Those of a step's last row first; whoever reads the rows in the same step has the right ones."""
    node, name = made(d, NEW + "_scale"), "damaged_scale"
    for reader in d.model.graph.node:
        for i, value in enumerate(reader.input):
            if value == NEW + "_scale":
                reader.input[i] = name
    node.output[0] = name
    ends = [constant(d, np.array([value], np.int64)) for value in (-1, np.iinfo(np.int64).min, 1, -1)]
    d.model.graph.node.append(helper.make_node("Slice", [name, *ends], [NEW + "_scale"]))


def rotated_columns_are_left_out(d: Damaged) -> None:
    """Cached rows end in zeros."""
    reader = next(n for n in d.model.graph.node if HELD + "_rotated" in n.input and n.op_type == "Concat")
    zero = helper.make_node("Sub", [HELD + "_rotated"] * 2, ["damaged_rotated"], name="damaged_rotated")
    reader.input[list(reader.input).index(HELD + "_rotated")] = "damaged_rotated"
    insert(d, reader, zero)


def multipliers_of_another_layer(d: Damaged) -> None:
    multiply, other = behind(d, HELD, "Mul"), f"state.{LAYER + 1}.latent_scale"
    reads = made(d, multiply.input[1])
    assert reads.input[0] == HELD + "_scale"
    reads.input[0] = other
    # Nobody else reads those of its own, which would be left out.
    d.model.graph.node.append(helper.make_node("Identity", [HELD + "_scale"], ["damaged_unread"]))


def new_rows_are_read_unrounded(d: Damaged) -> None:
    """A step sees of its own tokens what no later one will see."""
    back, exact = behind(d, NEW, "DequantizeLinear"), made(d, NEW).input[0]
    back.CopyFrom(helper.make_node("Identity", [exact], list(back.output), name=back.name))


def rows_are_rounded_down(d: Damaged) -> None:
    """By a thirty-second of themselves on average, half of what rounding may do."""
    node = made(d, NEW)
    factor = constant(d, np.array(1 - 1 / 32, np.float32))
    insert(d, node, helper.make_node("Mul", [node.input[0], factor], ["damaged_rows"], name="damaged_rows"))
    node.input[0] = "damaged_rows"


CASES = {
    "cached rows are not multiplied": Case(cached_rows_are_not_multiplied, "layer 1 routed"),
    "new rows are read without multipliers": Case(new_rows_are_read_without_multipliers, "layer 1 routed"),
    "rows are kept undivided": Case(rows_are_kept_undivided, "layer 1 latent"),
    "no multipliers": Case(no_multipliers, "layer 1 latent multipliers"),
    "max / 440": Case(largest(440), "layer 1 latent multipliers"),
    "max / 224": Case(largest(224), "layer 1 latent multipliers"),
    "multipliers are kept in another order": Case(multipliers_are_kept_in_another_order, "layer 1 (routed|latent)"),
    "rotated columns are left out": Case(rotated_columns_are_left_out, "layer 1 routed"),
    "multipliers of another layer": Case(multipliers_of_another_layer, "layer 1 routed"),
    "new rows are read unrounded": Case(new_rows_are_read_unrounded, "layer 1 routed", ("fp32",)),
    "rows are rounded down": Case(rows_are_rounded_down, "layer 1 latent"),
}
