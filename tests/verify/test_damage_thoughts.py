"""What can be wrong with thoughts is found, in either form of graph, and where it is."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
from corruptions import Damage, embedding_shifted
from damaged import Damaged
from eager import EagerExecutor
from onnx import helper
from traced import export_bundle

from v4export import api, presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.engram.vocabulary import read_token_map
from v4export.graphs.export import PORTABLE, THINKING, THINKING_MIX, THINKING_STEP
from v4export.model import reasoning
from v4export.package.bundle import Bundle
from v4export.plugins.thought_attention.op import thought_attention
from v4export.precision import precision as find_precision
from v4export.verify.boundary import Boundary
from v4export.verify.compare import compare, expected_boundaries
from v4export.verify.prompts import default_prompts
from v4export.verify.recording import record

REASONING = Reasoning(layers=2, steps=3)
OTHER_SIZES = replace(
    REASONING, num_heads=3, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=12, v_head_dim=14,
    intermediate_size=56,
)  # fmt: skip
START, END, NORM = "model.reasoning.start_embedding", "model.reasoning.end_embedding", "model.norm.weight"
BEFORE = ["weights", "embedding", "layer 0 dense", "layer 0 latent", "logits"]
OF_A_FORM = ["reasoning 0", "reasoning 1", "thought tokens", "thought weight", "thought logits"]
THOUGHTS = [
    "thought start", "reasoning 0 latent", "reasoning 1 latent", *OF_A_FORM, *(f"{name}, looped" for name in OF_A_FORM),
]  # fmt: skip


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """From a precision, the bundle of a dense layer with two reasoning layers behind it."""
    folder = tmp_path_factory.mktemp("thinking")
    one = replace(presets.load("tiny-v3").first_layers(1), left_out_layers=0, moe_layers=(), reasoning=REASONING)
    hub = synth(one, folder / "hub")
    return functools.cache(lambda precision: export_bundle(hub, folder / precision, precision))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sound_bundle_passes_with_room(thinking: Callable[[str], Bundle], precision: str) -> None:
    bundle = thinking(precision)
    found = api.verify(bundle.folder, decode=16)
    assert found.passed and found.layers == 1 and found.bodies
    assert [b.name for b in found.boundaries] == BEFORE + THOUGHTS
    assert len(found.boundaries) == expected_boundaries(bundle.config)
    check_room(found.boundaries)
    carried = {b.name: b.carried for b in found.boundaries}["thought logits"]
    assert carried is not None and (carried < 1e-5 or precision == "bf16")  # where other tokens may be thought


def check_room(boundaries: tuple[Boundary, ...] | list[Boundary]) -> None:
    """Where rounding explains a difference at all, it explains more than there is."""
    for one in boundaries:
        if one.limit > 0:
            assert one.rel * 1.5 < one.limit and one.mean * 1.3 <= one.mean_limit, one


def made(d: Damaged) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {output: node for node in d.model.graph.node for output in node.output}


def reading(d: Damaged, value: str, *op_types: str) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Nodes that read a value, and the place where they do."""
    for node in d.model.graph.node:
        if not op_types or node.op_type in op_types:
            yield from ((node, i) for i, name in enumerate(node.input) if name == value)


def one_of(d: Damaged, *op_types: str) -> onnx.NodeProto:
    """The first in order."""
    return next(n for n in d.model.graph.node if n.op_type in op_types)


def passed_through(node: onnx.NodeProto, at: int = 0) -> None:
    """In place of a node, one of its inputs as it is."""
    node.CopyFrom(helper.make_node("Identity", [node.input[at]], list(node.output), name=node.name))


def softmax_scale(factor: float) -> Damage:
    def damage(d: Damaged) -> None:
        scale = next(a.f for a in one_of(d, "ThoughtAttention").attribute if a.name == "scale")
        assert d.set_attribute("ThoughtAttention", "scale", factor * scale)
        d.rebuild()

    return damage


def vectors_swapped(d: Damaged) -> None:
    d.swap(START, END)


def second_step_a_position_late(d: Damaged) -> None:
    """Of the unrolled graph: i + 3 for i + 2."""
    steps = [n for n in d.model.graph.node if n.op_type == "Add" and n.input[1] in ("const.int64..2", "const.int64..3")]
    second, third = steps
    second.input[1] = third.input[1]


def every_step_a_position_early(d: Damaged) -> None:
    """Of the graph of one step: the number of earlier steps is not increased by this one."""
    at = next(n for n, _ in reading(d, "thought_at", "Reshape"))
    (((add, _),),) = ([*reading(d, at.output[0], "Add")],)
    add.input[1] = next(name for name in made(d)[add.input[1]].input if not name.startswith("const."))


def least_likely_token(d: Damaged) -> None:
    one_of(d, "ArgMax").op_type = "ArgMin"


def token_of_the_step_before(d: Damaged) -> None:
    """Of the unrolled graph: it is chosen by what the first step was given, and not by what it left."""
    made_by, node = made(d), one_of(d, "ArgMax")
    while node.op_type != "RMSNormalization":
        node = made_by[node.input[0]]
    node.input[0] = next(n for n, _ in reading(d, "trunk", "Reshape")).output[0]


def own_token_is_not_seen(d: Damaged) -> None:
    """In place of LessOrEqual, which says that a token is not behind the one that is thought about."""
    d.lower()
    found = [*d.nodes("LessOrEqual")]
    assert found
    for node in found:
        node.op_type = "Less"


def earlier_steps_are_forgotten(d: Damaged) -> None:
    """A thought's rows are those of its newest step."""
    made_by = made(d)
    for attention in d.model.graph.node:
        if attention.op_type == "ThoughtAttention":
            turned = made_by[attention.input[1]]
            joined = made_by[turned.input[0]]
            assert turned.op_type == "Transpose" and joined.op_type in ("Concat", "Unsqueeze")
            if joined.op_type == "Concat":
                turned.input[0] = joined.input[-1]


def weight_of_the_thought(d: Damaged) -> onnx.NodeProto:
    """1 - w, of which w is the second input."""
    return next(n for n in d.model.graph.node if n.op_type == "Sub" and n.input[0].startswith("const.float32..1"))


def weight_negated(d: Damaged) -> None:
    weight, nodes = weight_of_the_thought(d).input[1], d.model.graph.node
    maker = made(d)[weight]
    maker.output[0] = "damaged_weight"
    nodes.insert([*nodes].index(maker) + 1, helper.make_node("Neg", ["damaged_weight"], [weight]))


def weights_exchanged(d: Damaged) -> None:
    """w of the plain prediction, 1 - w of the thought."""
    rest = weight_of_the_thought(d)
    places = [next(reading(d, value, "Unsqueeze")) for value in (rest.output[0], rest.input[1])]
    for (node, at), value in zip(places, (rest.input[1], rest.output[0]), strict=True):
        node.input[at] = value


def talk_head_without_its_first_relu(d: Damaged) -> None:
    passed_through(one_of(d, "Relu"))


def talk_head_given_the_thought_first(d: Damaged) -> None:
    makers, node = made(d), one_of(d, "Relu")
    while node.op_type != "Concat":
        node = makers[node.input[0]]
    plain, thought = node.input
    node.input[:] = [thought, plain]


def weight_of_another_layer(name: str) -> Damage:
    def damage(d: Damaged) -> None:
        d.point(f"model.reasoning.layers.1.{name}", d.place(f"model.reasoning.layers.0.{name}"))

    return damage


def rows_not_turned(d: Damaged) -> None:
    turns = [n for n in d.nodes("RotaryEmbedding") if n.name.startswith("reasoning.")]
    assert len(turns) == 2
    for node in turns:
        passed_through(node)


def rows_of_the_final_norm(d: Damaged) -> None:
    d.point("model.reasoning.layers.1.input_layernorm.weight", d.place(NORM))


def thoughts_start_from_normed(d: Damaged) -> None:
    normed = next(n for n, _ in reading(d, NORM, "RMSNormalization"))
    made(d)["trunk"].input[0] = normed.output[0]


@dataclass(frozen=True)
class Case:
    """A damage to some of the graphs, each by itself, the first boundary that it must fail, and where it shows."""

    damage: Damage
    graphs: tuple[str, ...]
    first: str


BOTH, ENDS = (THINKING, THINKING_STEP), (THINKING, THINKING_MIX)
STEPS = "reasoning [01]"
CASES = {
    "softmax scale 3% up": Case(softmax_scale(1.03), BOTH, STEPS),
    "start and end swapped": Case(vectors_swapped, BOTH, "reasoning 0"),
    "embedding of the next token": Case(embedding_shifted, BOTH, "reasoning 0"),
    "second step a position late": Case(second_step_a_position_late, (THINKING,), STEPS),
    "every step a position early": Case(every_step_a_position_early, (THINKING_STEP,), STEPS),
    "least likely token": Case(least_likely_token, BOTH, "thought tokens"),
    "token of the step before": Case(token_of_the_step_before, (THINKING,), "thought tokens"),
    "own token is not seen": Case(own_token_is_not_seen, BOTH, "reasoning 0"),
    "earlier steps are forgotten": Case(earlier_steps_are_forgotten, BOTH, "reasoning 0"),
    "output weights of another layer": Case(weight_of_another_layer("self_attn.o_proj.weight"), BOTH, "reasoning 1"),
    "weight negated": Case(weight_negated, ENDS, "thought weight"),
    "weights exchanged": Case(weights_exchanged, ENDS, "thought logits"),
    "talk head without its first ReLU": Case(talk_head_without_its_first_relu, ENDS, "thought weight"),
    "talk head given the thought first": Case(talk_head_given_the_thought_first, ENDS, "thought weight"),
    "rows not turned": Case(rows_not_turned, (PORTABLE,), "reasoning 0 latent"),
    "rows of the final norm": Case(rows_of_the_final_norm, (PORTABLE,), "reasoning 1 latent"),
    "keys' weights of another layer": Case(
        weight_of_another_layer("self_attn.kv_a_proj_with_mqa.weight"), (PORTABLE,), "reasoning 1 latent"
    ),
    "thoughts start from what is normed": Case(thoughts_start_from_normed, (PORTABLE,), "thought start"),
}
#: To be fast, one form of graph and one precision each, in turn.
RUNS = [
    pytest.param(name, case.graphs[-(i % 2)], ("fp32", "bf16")[i // 2 % 2], id=name)
    for i, (name, case) in enumerate(CASES.items())
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "graph", "precision"), RUNS)
def test_damage_fails_where_it_is(
    thinking: Callable[[str], Bundle], tmp_path: Path, name: str, graph: str, precision: str
) -> None:
    damaged = Damaged(thinking(precision).folder, tmp_path / "damaged", graph)
    CASES[name].damage(damaged)
    damaged.save()
    found = api.verify(damaged.folder, decode=2)
    # References are checked by themselves; here the numbers have to tell.
    bad = [b for b in found.boundaries if not b.ok and b.name != "weights"]
    assert bad, name
    assert re.fullmatch(f"{CASES[name].first}(, looped)?", bad[0].name), (bad[0].name, bad[0].notes)
    assert bad[0].notes and {b.name for b in bad} <= {*THOUGHTS}


#: What else the hidden states of thoughts come from: collapsed streams, shared entries, Engram.
FAMILIES = {
    preset: replace(presets.load(preset).first_layers(count), left_out_layers=0, reasoning=OTHER_SIZES)
    for preset, count in (("tiny-v3.2", 1), ("tiny-v4", 2), ("tiny-v4.1", 3))
}


def checked(folder: Path, preset: str, precision: str, damage: Any = None) -> list[Boundary]:
    """The definition, run as a graph is and compared with itself; ``damage`` is a context to run in."""
    checkpoint = Checkpoint.open(synth(FAMILIES[preset], folder / "hub"))
    config, weights = checkpoint.config, audit(checkpoint).weights
    words = read_token_map(checkpoint.directory, config.engram, config.vocab_size) if config.engram else None
    how = find_precision(precision, config)
    executor = EagerExecutor(weights, config, how, token_map=words)
    with damage or nullcontext():
        recordings = record(executor, config, default_prompts(folder, config, 70), chunk=13, decode=3)
    boundaries = compare(weights, config, how, recordings, token_map=words)
    assert len(boundaries) == expected_boundaries(config) - 1  # weights are compared elsewhere
    assert [b.name for b in boundaries][-len(THOUGHTS) :] == THOUGHTS
    return boundaries


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_the_definition_agrees_with_itself(tmp_path: Path, preset: str, precision: str) -> None:
    boundaries = checked(tmp_path, preset, precision)
    assert all(b.ok for b in boundaries), [b for b in boundaries if not b.ok]
    check_room(boundaries)


def with_steps_of_another_thought(q: Any, own: Any, *rest: Any) -> Any:
    return thought_attention(q, own.roll(1, 0), *rest)


def with_a_larger_scale(*args: Any) -> Any:
    *rest, scale = args
    return thought_attention(*rest, 1.03 * scale)


def least_likely(self: Any, z: Any) -> Any:
    return self.logits(self.norm(z)).argmin(-1)


# what is wrong -> where it is brought about, and the first boundary that is to show it
OF_THE_DEFINITION: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "steps of another thought": (reasoning, "thought_attention", with_steps_of_another_thought, "reasoning 0"),
    "softmax scale 3% up": (reasoning, "thought_attention", with_a_larger_scale, "reasoning 0"),
    "least likely token": (reasoning.ThinkingHead, "token", least_likely, "thought tokens"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THE_DEFINITION)
def test_damage_to_the_definition_fails_where_it_is(tmp_path: Path, name: str) -> None:
    *where, first = OF_THE_DEFINITION[name]
    bad = [b for b in checked(tmp_path, "tiny-v4", "fp32", mock.patch.object(*where)) if not b.ok]
    assert bad and bad[0].name == first and bad[0].notes
