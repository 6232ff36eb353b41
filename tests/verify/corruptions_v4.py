"""Damages to the graphs of DeepSeek-V3.2 and V4: masks, rotations, indexers, compressors, hyper-connections.

What an attribute decides is decided in an op's body, so bodies are made again once attributes have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from corruptions import Case, Damage
from damaged import Damaged
from onnx import helper, numpy_helper

HALVES, WIDTH = 2, 32  # of an entry of the model that is damaged


def attribute(op_type: str, name: str, value: float) -> Damage:
    def damage(d: Damaged) -> None:
        assert d.set_attribute(op_type, name, value)
        d.rebuild()

    return damage


def of_layer(d: Damaged, layer: int | None, *op_types: str) -> list[onnx.NodeProto]:
    prefix = "layers." if layer is None else f"layers.{layer}."
    found = [n for n in d.model.graph.node if n.op_type in op_types and n.name.startswith(prefix)]
    assert found, (layer, op_types)
    return found


def constant(d: Damaged, value: np.ndarray) -> str:
    name = f"damage.{len(d.model.graph.initializer)}"
    d.model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def pass_through(
    op_types: Sequence[str], at: int, make: Callable[[Damaged, str, str], onnx.NodeProto], layer: int | None = None
) -> Damage:
    """Put a node before one input of ops."""

    def damage(d: Damaged) -> None:
        for node in of_layer(d, layer, *op_types):
            name = f"{node.name}.damaged.{at}"
            new = make(d, node.input[at], name)
            node.input[at] = name
            places = [i for i, n in enumerate(d.model.graph.node) if n.name == node.name]
            d.model.graph.node.insert(places[0], new)

    return damage


def in_place_of(op_type: str, at: int, value: Callable[[onnx.TensorProto], np.ndarray], layer: int) -> Damage:
    """Another weight for one input of ops."""

    def damage(d: Damaged) -> None:
        for node in of_layer(d, layer, op_type):
            node.input[at] = constant(d, value(d.pointer(node.input[at])))

    return damage


def both(*damages: Damage) -> Damage:
    def damage(d: Damaged) -> None:
        for one in damages:
            one(d)

    return damage


def entries_are_seen_late(d: Damaged) -> None:
    """(i + 1) // ratio without its 1."""
    count = 0
    for function in d.model.functions:
        if function.name not in ("IndexSelect", "CompressedAttention"):
            continue
        made = {output: node for node in function.node for output in node.output}
        for node in function.node:
            add = made.get(node.input[0]) if node.op_type == "Div" else None
            one = made.get(add.input[1]) if add is not None and add.op_type == "Add" else None
            if one is not None and one.op_type == "Constant":
                one.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(0, np.int64)))
                count += 1
    assert count == 2, count


def window_is_one_less(d: Damaged) -> None:
    """The oldest token of the window is not seen, among new tokens."""
    count = 0
    for function in d.model.functions:
        made = {output: node for node in function.node for output in node.output}
        for node in function.node:
            if function.name.endswith("Attention") and node.op_type == "And":
                less = made[node.input[1]]
                assert less.op_type == "Less"
                age = helper.make_node("Add", [less.input[0], "damaged_one"], ["damaged_age"])
                one = helper.make_node("Constant", [], ["damaged_one"], value=numpy_helper.from_array(np.array([1])))
                less.input[0] = "damaged_age"
                at = next(i for i, n in enumerate(function.node) if list(n.output) == list(less.output))
                function.node.insert(at, age)
                function.node.insert(at, one)
                count += 1
                break
    assert count == 3, count


def no_inverse_rotation(d: Damaged) -> None:
    for node in of_layer(d, 2, "Neg"):
        node.op_type = "Identity"


def index_queries_not_turned(d: Damaged) -> None:
    for node in of_layer(d, 1, "RotaryEmbedding"):
        if any(a.name == "num_heads" and a.i == 32 for a in node.attribute):
            node.CopyFrom(helper.make_node("Identity", node.input[:1], list(node.output), name=node.name))


def theta_of_window_layers(d: Damaged) -> None:
    """Tokens of a layer with entries turned as those of a window layer."""
    wrong, right = (of_layer(d, i, "RotaryEmbedding")[0].input[1:] for i in (0, 2))
    for node in of_layer(d, 2, "RotaryEmbedding", "Neg"):
        for i, name in enumerate(node.input):
            if name in right:
                node.input[i] = wrong[list(right).index(name)]


def entries_turned_by_their_last_token(d: Damaged) -> None:
    three = constant(d, np.array(3))
    for at, node in enumerate(d.model.graph.node):
        if node.name.startswith("embed.") and node.op_type == "Mul" and node.input[1] == "const.int64..4":
            out = node.output[0]
            node.output[0] = "damaged_position"
            d.model.graph.node.insert(at + 1, helper.make_node("Add", ["damaged_position", three], [out]))
            return
    raise AssertionError("no positions of entries")


def halves_swapped(d: Damaged) -> None:
    swapped = np.arange(2 * HALVES * WIDTH).reshape(2, HALVES, WIDTH)[:, ::-1].ravel().copy()

    def gather(d: Damaged, before: str, after: str) -> onnx.NodeProto:
        return helper.make_node("Gather", [before, constant(d, swapped)], [after], axis=-1)

    compressors = [n for n in of_layer(d, 1, "CompressTokens") if n.input[1] == "state.1.open"]
    assert len(compressors) == 1
    compressors[0].op_type = "Swapped"
    for at in (0, 1):
        pass_through(["Swapped"], at, gather)(d)
    compressors[0].op_type = "CompressTokens"


def hash_table_one_row_on(d: Damaged) -> None:
    name = "model.layers.0.mlp.gate.tid2eid"
    place, tensor = d.place(name), d.pointer(name)
    d.point(name, place | {"offset": str(int(place["offset"]) + 8 * tensor.dims[1])})


def no_clamp_of_experts(d: Damaged) -> None:
    for node in d.nodes("Clip"):
        del node.input[1:]
    attribute("MoeExperts", "limit", float("inf"))(d)


def no_clamp_of_shared_experts(d: Damaged) -> None:
    for node in of_layer(d, 2, "Clip"):
        del node.input[1:]


def transposed(d: Damaged, before: str, after: str) -> onnx.NodeProto:
    return helper.make_node("Transpose", [before], [after], perm=[0, 2, 1])


def halved(d: Damaged, before: str, after: str) -> onnx.NodeProto:
    return helper.make_node("Mul", [before, constant(d, np.array(0.5, np.float32))], [after])


def absolute(d: Damaged, before: str, after: str) -> onnx.NodeProto:
    return helper.make_node("Abs", [before], [after])


def zeros(tensor: onnx.TensorProto) -> np.ndarray:
    return np.zeros(tuple(tensor.dims), np.float32)


def never(tensor: onnx.TensorProto) -> np.ndarray:
    return np.full(tuple(tensor.dims), -1e4, np.float32)


def half_split_for_pairs(d: Damaged) -> None:
    """The indexer's rotations as those of the attention."""
    for node in of_layer(d, None, "RotaryEmbedding"):
        if not any(a.name == "interleaved" and a.i for a in node.attribute):
            kept = [a for a in node.attribute if a.name != "interleaved"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("interleaved", 1)])


BOTH = ("fp32", "bf16")
HYPER = "layer 0 window hash"

#: Of a graph of preset tiny-v4, whose experts' gates are cut off at 1.
V4 = {
    "entries are seen a token late": Case(entries_are_seen_late, "layer 1 csa hash", BOTH),
    "window of one token less": Case(window_is_one_less, HYPER, BOTH),
    "no inverse rotation": Case(no_inverse_rotation, "layer 2 hca", BOTH),
    "theta of window layers": Case(theta_of_window_layers, "layer 2 hca", BOTH),
    "no sink": Case(in_place_of("CompressedAttention", 6, never, 2), "layer 2 hca", BOTH),
    "comb not transposed": Case(pass_through(["HyperMix"], 3, transposed), HYPER, BOTH),
    "post without its 2": Case(pass_through(["HyperMix"], 2, halved), HYPER, BOTH),
    "two iterations of Sinkhorn": Case(attribute("HyperConnection", "iterations", 2), HYPER, BOTH),
    # At 16 bits, these are less than a rounding of the streams.
    "nineteen iterations of Sinkhorn": Case(attribute("HyperConnection", "iterations", 19), HYPER, ("fp32",)),
    "no eps in hyper-connections": Case(attribute("HyperConnection", "eps", 0.0), HYPER, ("fp32",)),
    "another eps of the streams' norm": Case(attribute("HyperConnection", "norm_eps", 1e-3), HYPER, ("fp32",)),
    "softmax scale 2% up": Case(attribute("SparseAttention", "scale", 1.02 * WIDTH**-0.5), "layer 1 csa hash", BOTH),
    "no position bias": Case(in_place_of("CompressTokens", 2, zeros, 1), "layer 1 csa( hash| entry)", BOTH),
    "halves swapped": Case(halves_swapped, "layer 1 csa( hash| entry)", BOTH),
    "entries turned by their last token": Case(
        entries_turned_by_their_last_token, "layer 1 csa( hash| entry)", BOTH
    ),
    "weights of index heads without sign": Case(
        pass_through(["IndexSelect"], 1, absolute), "layer 1 csa hash", BOTH
    ),
    "index queries not turned": Case(index_queries_not_turned, "layer 1 csa hash", BOTH),
    "one entry less selected": Case(attribute("IndexSelect", "top_k", 7), "layer 1 csa hash", BOTH),
    "hash table one row on": Case(hash_table_one_row_on, HYPER, BOTH),
    "experts without their limit": Case(no_clamp_of_experts, HYPER, BOTH),
    "shared experts without their limit": Case(no_clamp_of_shared_experts, "layer 2 hca", BOTH),
}  # fmt: skip

V32 = {
    "index rotations in pairs": Case(half_split_for_pairs, "layer 0 (dense|index_key)", BOTH),
    "one token less selected": Case(attribute("IndexSelect", "top_k", 7), "layer 0 dense", BOTH),
}
