"""What can be wrong with a layer that drafts is found, and where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from corruptions import Damage, embedding_shifted
from damaged import Damaged
from onnx import helper
from traced import export_bundle

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.graphs.export import DRAFTING, PORTABLE
from v4export.package.bundle import Bundle
from v4export.verify.compare import expected_boundaries

pytestmark = pytest.mark.slow


def drafting(preset: str, count: int) -> ModelConfig:
    """The beginning of a preset, with a layer that drafts."""
    first = presets.load(preset).first_layers(count)
    return replace(first, left_out_layers=0, num_mtp_layers=1, drafts=True)


MODELS = {
    "v3": drafting("tiny-v3", 2),
    "v3.2": drafting("tiny-v3.2", 1),
    "v4": drafting("tiny-v4", 2),
}
ROWS = {"v3": ["latent"], "v3.2": ["latent", "index_key"], "v4": ["window keys"]}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """From a model, a precision and how its state is kept."""
    folder = tmp_path_factory.mktemp("drafting")
    hub = functools.cache(lambda model: synth(MODELS[model], folder / model))

    @functools.cache
    def made(model: str, precision: str, state: str) -> Bundle:
        how = {"draft": True, "state": state}
        return export_bundle(hub(model), folder / f"{model}-{precision}-{state}", precision, **how)

    return lambda model, precision, state="auto": made(model, precision, state)


@pytest.mark.parametrize(
    ("model", "precision", "state"),
    [("v3", "fp32", "auto"), ("v3.2", "bf16", "auto"), ("v4", "bf16", "auto"), ("v4", "fp32", "fp8"),
     ("v3", "fp8", "fp8"), ("v4", "fp8", "auto")],
)  # fmt: skip
def test_a_sound_bundle_passes(bundle: Callable[..., Bundle], model: str, precision: str, state: str) -> None:
    one = bundle(model, precision, state)
    found = api.verify(one.folder, decode=8)
    assert found.passed and found.bodies, [b for b in found.boundaries if not b.ok]
    assert len(found.boundaries) == expected_boundaries(one.config)
    names = [b.name for b in found.boundaries]
    at = names.index("features")
    kind = one.config.drafter.kind(0)
    assert names[at - 1 : at + 3] == ["logits", "features", "draft entry", f"draft layer {kind}"]
    assert names[-2:] == ["draft logits", "draft features"]
    rows = [name.removeprefix("draft layer ") for name in names[at + 3 : -2]]
    assert [name for name in rows if not name.endswith((" multipliers", " rotated"))] == ROWS[model]
    assert all(b.experts is None or b.experts[0] > 1 for b in found.boundaries if b.name.startswith("draft"))


def own(d: Damaged, model: str, name: str) -> str:
    """A weight of the layer that drafts."""
    return f"model.layers.{MODELS[model].num_layers}.{name}"


def swapped(one: str, other: str) -> Callable[[str], Damage]:
    return lambda model: lambda d: d.swap(own(d, model, one), own(d, model, other))


def in_place_of(one: str, theirs: str) -> Callable[[str], Damage]:
    return lambda model: lambda d: d.point(own(d, model, one), d.place(theirs))


def joined_the_other_way(model: str) -> Damage:
    """Features first, and then the token."""

    def damage(d: Damaged) -> None:
        made = {output: node for node in d.model.graph.node for output in node.output}
        entry = next(n for n in d.model.graph.node if own(d, model, "eh_proj.weight") in n.input)
        node = entry
        while node.op_type != "Concat":
            node = made[node.input[0]]
        node.input[:] = [*node.input][::-1]

    return damage


def features_as_they_are(model: str) -> Damage:
    """Not normed again."""

    def damage(d: Damaged) -> None:
        node = next(n for n in d.model.graph.node if own(d, model, "hnorm.weight") in n.input)
        replaced = helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name)
        node.CopyFrom(replaced)
        unused = d.pointer(own(d, model, "hnorm.weight"))
        d.model.graph.initializer.remove(unused)

    return damage


def handed_over_as_it_is(_: str) -> Damage:
    """What is not normed, of the model."""

    def damage(d: Damaged) -> None:
        made: dict[str, onnx.NodeProto] = {o: node for node in d.model.graph.node for o in node.output}
        reshape = made["features"]
        reshape.input[0] = made[reshape.input[0]].input[0]

    return damage


def shifted(_: str) -> Damage:
    return embedding_shifted


def softmax_scale(model: str) -> Damage:
    def damage(d: Damaged) -> None:
        op = "WindowAttention" if MODELS[model].compressed else "LatentAttention"
        node = next(n for n in d.model.graph.node if n.op_type == op)
        scale = next(a.f for a in node.attribute if a.name == "scale")
        assert d.set_attribute(op, "scale", 1.03 * scale)
        d.rebuild()

    return damage


CASES: dict[str, tuple[str, str, str, Callable[[str], Damage], str]] = {
    "norms of token and features swapped": ("v3", "fp32", DRAFTING, swapped("enorm.weight", "hnorm.weight"), "entry"),
    "features first": ("v3", "bf16", DRAFTING, joined_the_other_way, "entry"),
    "features not normed again": ("v4", "fp32", DRAFTING, features_as_they_are, "entry"),
    "projections swapped": ("v4", "bf16", DRAFTING, swapped("e_proj.weight", "h_proj.weight"), "entry"),
    "embedding of another token": ("v3", "fp32", DRAFTING, shifted, "entry"),
    "softmax scale 3% up": ("v4", "fp32", DRAFTING, softmax_scale, "layer window"),
    "output weights swapped": (
        "v3", "fp32", DRAFTING, swapped("mlp.experts.1.up_proj.weight", "mlp.experts.2.up_proj.weight"), "layer routed",
    ),
    "norm of its own and of its features swapped": (
        "v4", "bf16", DRAFTING, swapped("shared_head.norm.weight", "enorm.weight"), "entry",
    ),
    "not normed for the model's end": (
        "v3", "fp32", DRAFTING, swapped("shared_head.norm.weight", "post_attention_layernorm.weight"), "layer routed",
    ),
    "handed over without a norm": ("v3", "bf16", PORTABLE, handed_over_as_it_is, "features"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_damage_fails_where_it_is(bundle: Callable[..., Bundle], tmp_path: Path, name: str) -> None:
    model, precision, graph, damage, first = CASES[name]
    damaged = Damaged(bundle(model, precision).folder, tmp_path / "damaged", graph)
    damage(model)(damaged)
    damaged.save()
    found = api.verify(damaged.folder, decode=2)
    bad = [b for b in found.boundaries if not b.ok and b.name != "weights"]
    assert bad, name
    assert bad[0].name == (first if first == "features" else f"draft {first}") and bad[0].notes


def test_the_node_is_found(bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    """By comparing a damaged bundle with a sound one."""
    sound = bundle("v3", "fp32")
    damaged = Damaged(sound.folder, tmp_path / "damaged", DRAFTING)
    joined_the_other_way("v3")(damaged)
    damaged.save()
    found = api.bisect(damaged.folder, against=sound.folder)
    assert found.node and found.node.graph.startswith("draft") and found.node.op_type == "Concat"
