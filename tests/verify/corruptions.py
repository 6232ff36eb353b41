"""Ways to damage a bundle as a defect of an exporter would: wrong pointers, wrong attributes, nodes left out.

The portable graph is damaged and lowered again for onnxruntime, so that what the lowering makes of a node does not
matter; a few damages are done to the lowered graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from damaged import Damaged
from onnx import helper, numpy_helper

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Damage = Callable[[Damaged], None]


def expert(layer: int, number: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight"


def gate_and_up_swapped(d: Damaged) -> None:
    d.swap(expert(2, 3, "gate"), expert(2, 3, "up"))


def two_experts_down_swapped(d: Damaged) -> None:
    d.swap(expert(3, 0, "down"), expert(3, 1, "down"))


def another_layers_expert(d: Damaged) -> None:
    d.point(expert(1, 5, "up"), d.place(expert(2, 5, "up")))


def fp8_scale_of_another_expert(d: Damaged) -> None:
    d.point(expert(1, 2, "down") + "_scale_inv", d.place(expert(1, 3, "down") + "_scale_inv"))


def fp8_scale_of_another_layer(d: Damaged) -> None:
    d.point(
        "model.layers.2.self_attn.o_proj.weight_scale_inv", d.place("model.layers.1.self_attn.o_proj.weight_scale_inv")
    )


def softmax_scale(factor: float) -> Damage:
    def damage(d: Damaged) -> None:
        scale = 48**-0.5 * (0.1 * np.log(4.0) + 1) ** 2
        assert d.set_constants(scale, scale * factor)
        assert d.set_attribute("LatentAttention", "scale", scale * factor) == 4

    return damage


def routed_scale(value: float) -> Damage:
    def damage(d: Damaged) -> None:
        assert d.set_constants(2.5, value)
        assert d.set_attribute("MoeRoute", "scale", value) == 3

    return damage


def top_k(count: int) -> Damage:
    def damage(d: Damaged) -> None:
        for node in list(d.nodes("TopK")):
            if (constant := _constant(d, node.input[1])) is not None and numpy_helper.to_array(constant).tolist() == [
                4
            ]:
                constant.CopyFrom(numpy_helper.from_array(np.array([count])))
        assert d.set_attribute("MoeRoute", "top_k", count) == 3

    return damage


def _constant(d: Damaged, name: str) -> onnx.TensorProto | None:
    for node in d.nodes("Constant"):
        if node.output[0] == name:
            return next((a.t for a in node.attribute if a.name == "value"), None)
    return None


def rotary_halves(d: Damaged) -> None:
    assert d.set_attribute("RotaryEmbedding", "interleaved", 0)


def epsilon(layer: int | None) -> Damage:
    def damage(d: Damaged) -> None:
        assert d.set_attribute("RMSNormalization", "epsilon", 1e-3, layer)

    return damage


def no_shared_expert(d: Damaged) -> None:
    (node,) = (n for n in d.nodes("Add") if any("layers.1.moe_experts" in i for i in n.input))
    routed = next(i for i in node.input if "moe_experts" in i)
    node.CopyFrom(helper.make_node("Identity", [routed], list(node.output), name=node.name))


def no_residual(d: Damaged) -> None:
    node = next(n for n in d.nodes("Add") if "hidden.1" in n.input)
    branch = next(i for i in node.input if i != "hidden.1")
    node.CopyFrom(helper.make_node("Identity", [branch], list(node.output), name=node.name))


def embedding_shifted(d: Damaged) -> None:
    tensor, place = d.pointer(EMBEDDING), d.place(EMBEDDING)
    row = int(place["length"]) // tensor.dims[0]
    d.point(EMBEDDING, place | {"offset": str(int(place["offset"]) + row)})


def head_is_the_embedding(d: Damaged) -> None:
    d.point(HEAD, d.place(EMBEDDING))


def nan_in_a_weight(d: Damaged) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    place, tensor = d.place(name), d.pointer(name)
    file = d.folder / place["location"]
    data = bytearray(file.read_bytes())
    width = {1: 4, 16: 2, 17: 1}[tensor.data_type]
    data[int(place["offset"]) : int(place["offset"]) + width] = b"\xff" * width  # a NaN in every one of the types
    file.unlink()  # it is shared with the sound bundle, or with the checkpoint
    file.write_bytes(data)


def causal_mask(op_type: str) -> Damage:
    """In place of LessOrEqual, which says that a key's step is not after the query's."""

    def damage(d: Damaged) -> None:
        d.lower()
        found = list(d.nodes("LessOrEqual"))
        assert found
        for node in found:
            node.op_type = op_type

    return damage


def position_ignored(readers: str) -> Damage:
    """``position`` is taken for zero where ``readers`` read it: by the rotations, or by the mask of cached rows."""

    def damage(d: Damaged) -> None:
        graph, count = d.model.graph, 0
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == "position" and (node.name.startswith("embed.") == (readers == "rotations")):
                    node.input[i] = "no_position"
                    count += 1
        graph.node.insert(0, helper.make_node("Sub", ["position", "position"], ["no_position"]))
        assert count

    return damage


@dataclass(frozen=True)
class Case:
    """A damage, the first boundary that it must fail, and the precisions in which it exists and shows."""

    damage: Damage
    first: str
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp8")


CASES = {
    "gate and up of an expert swapped": Case(gate_and_up_swapped, "layer 2 routed"),
    "down of two experts swapped": Case(two_experts_down_swapped, "layer 3 routed"),
    "expert of another layer": Case(another_layers_expert, "layer 1 routed"),
    "multipliers of another expert": Case(fp8_scale_of_another_expert, "layer 1 routed", ("fp8",)),
    "multipliers of another layer": Case(fp8_scale_of_another_layer, "layer 2 routed", ("fp8",)),
    "softmax scale 5% up": Case(softmax_scale(1.05), "layer [01] (dense|routed)"),
    "softmax scale 5% down": Case(softmax_scale(0.95), "layer [01] (dense|routed)"),
    "routed scale 2.4 for 2.5": Case(routed_scale(2.4), "layer 1 routed"),
    "rotary halves for pairs": Case(rotary_halves, "layer 0 dense"),
    "epsilon 1e-3 everywhere": Case(epsilon(None), "layer 0 dense"),
    # Later residual streams are so large that this is less than a tenth of a 16-bit rounding.
    "epsilon 1e-3 in one layer": Case(epsilon(2), "layer 2 routed", ("fp32",)),
    "no shared expert": Case(no_shared_expert, "layer 1 routed"),
    "no residual": Case(no_residual, "layer 2 routed"),
    "embedding one row on": Case(embedding_shifted, "embedding"),
    "head is the embedding": Case(head_is_the_embedding, "logits"),
    "NaN in a weight": Case(nan_in_a_weight, "layer 2 routed"),
    "a token does not see itself": Case(causal_mask("Less"), "layer 0 dense"),
    "tokens see what follows": Case(causal_mask("GreaterOrEqual"), "layer 0 dense"),
    "rotations ignore the position": Case(position_ignored("rotations"), "layer 0 dense"),
    "cached rows are not seen": Case(position_ignored("mask"), "layer 0 dense"),
}
