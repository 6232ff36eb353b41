"""What a user changes of a model before it is exported, and how a bundle remembers it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from v4export import presets
from v4export.config import ModelConfig, Reasoning
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.config.readers import to_hub_config
from v4export.errors import BadInput, NotSupported
from v4export.package.bundle import MANIFEST, Bundle
from v4export.plain import to_json

PLAIN, ENGRAM = presets.load("tiny-v3"), presets.load("tiny-v4.1")
THINKS = replace(PLAIN, reasoning=Reasoning(2, 4, num_heads=3))
DRAFTS = replace(PLAIN, num_mtp_layers=1)
MODELS = {"plain": PLAIN, "engram": ENGRAM, "thinks": THINKS, "drafts": DRAFTS}
#: What can be chosen, and of which model.
CHOICES = [
    ("plain", Chosen(layers=2)),
    ("engram", Chosen(layers=1)),
    ("engram", Chosen(engram_inside=True)),
    ("engram", Chosen(2, True)),
    ("thinks", Chosen(think_steps=0)),
    ("thinks", Chosen(think_steps=1)),
    ("thinks", Chosen(think_steps=9)),
    ("thinks", Chosen(layers=1, think_steps=2)),
    ("thinks", Chosen(think_steps=2, state="fp8")),
    ("plain", Chosen(state="fp8")),
    ("drafts", Chosen(draft=True)),
    ("drafts", Chosen(layers=3, state="fp8", draft=True)),
]


@pytest.mark.parametrize("name", presets.names())
def test_nothing_is_changed(name: str) -> None:
    assert UNCHANGED.of(presets.load(name)) == presets.load(name)


def test_layers() -> None:
    for config in MODELS.values():
        assert Chosen(layers=2).of(config) == config.first_layers(2)
        assert Chosen(layers=config.num_layers).of(config) == config
    # Reasoning layers stay, behind those that are left.
    assert Chosen(layers=1).of(THINKS).reasoning == THINKS.reasoning and Chosen(layers=1).of(THINKS).state_layers == 3


def test_state() -> None:
    assert not PLAIN.state_fp8 and not Chosen().of(PLAIN).state_fp8
    config = Chosen(state="fp8", layers=1).of(THINKS)
    assert config.state_fp8 and config.thinker.state_fp8 and config.num_layers == 1
    with pytest.raises(BadInput, match="'fp4', known: auto, fp8"):
        Chosen(state="fp4").of(PLAIN)


def test_drafts() -> None:
    config = Chosen(draft=True, state="fp8").of(DRAFTS)
    assert config.drafts and not Chosen().of(DRAFTS).drafts
    own = config.drafter
    assert (own.num_layers, own.moe_layers, own.state_fp8, own.hidden_size) == (1, (0,), True, PLAIN.hidden_size)
    four = Chosen(draft=True).of(replace(presets.load("tiny-v4"), num_mtp_layers=1)).drafter
    assert four.compressed and four.compressed.layers == ("window",) and not four.hash_layers


@pytest.mark.parametrize(
    ("config", "chosen", "error", "message"),
    [
        (PLAIN, Chosen(draft=True), BadInput, "no multi-token prediction layer"),
        (DRAFTS, Chosen(layers=2, draft=True), BadInput, "goes on from the last layer"),
        (replace(THINKS, num_mtp_layers=1), Chosen(draft=True), NotSupported, "reasoning layers"),
        (replace(ENGRAM, num_mtp_layers=3), Chosen(draft=True), NotSupported, "DSpark"),
        (replace(presets.load("v4-lite"), num_mtp_layers=1), Chosen(think_steps=0, draft=True), NotSupported, "Engram"),
    ],
)
def test_what_cannot_draft(config: ModelConfig, chosen: Chosen, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chosen.of(config)
    assert Chosen(think_steps=0, draft=True).of(replace(THINKS, num_mtp_layers=1)).drafts


def test_engram_inside() -> None:
    inside = Chosen(engram_inside=True).of(ENGRAM)
    assert ENGRAM.engram and inside == replace(ENGRAM, engram=replace(ENGRAM.engram, inside=True)) != ENGRAM
    assert UNCHANGED.of(inside) == ENGRAM


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_think_steps(steps: int) -> None:
    config = Chosen(think_steps=steps).of(THINKS)
    assert config == replace(THINKS, reasoning=Reasoning(2, steps, num_heads=3))
    assert config.thinks == (steps > 0) and config.state_layers == PLAIN.num_layers + 2 * config.thinks


def test_a_model_without_thoughts_may_be_told_not_to_think() -> None:
    assert Chosen(think_steps=0).of(PLAIN) == PLAIN


@pytest.mark.parametrize(
    ("model", "chosen", "message", "hint"),
    [
        ("plain", Chosen(layers=0), "layers 0:0 are not a first part", "it has 3 layers"),
        ("plain", Chosen(layers=4), "layers 0:4 are not a first part", "it has 3 layers"),
        ("thinks", Chosen(layers=-1, think_steps=2), "layers 0:-1 are not", "give --layers 0:N"),
        ("plain", Chosen(engram_inside=True), "has no Engram tables", "leave --engram-inside out"),
        # Layer 1 is the first that looks anything up.
        ("engram", Chosen(1, True), "has no Engram tables", "leave --engram-inside out"),
        ("plain", Chosen(think_steps=3), "has no reasoning layers", "leave --think-steps out"),
        ("engram", Chosen(2, True, 1), "has no reasoning layers", "leave --think-steps out"),
    ],
)
def test_what_the_model_does_not_have(model: str, chosen: Chosen, message: str, hint: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        chosen.of(MODELS[model])
    assert hint in str(raised.value)


@pytest.mark.parametrize("chosen", [UNCHANGED, *(chosen for _, chosen in CHOICES)])
def test_round_trip(chosen: Chosen) -> None:
    assert Chosen.read(json.loads(to_json({"chosen": chosen}))["chosen"]) == chosen


def opened(folder: Path, config: ModelConfig, **rest: Any) -> Bundle:
    """A folder with nothing but a manifest."""
    nothing = {"checkpoint": {"path": "", "header_sha256": ""}, "files": {}, "keep": [], "max_seq_len": 8}
    manifest = {"format": 1, "config": to_hub_config(config), "precision": "fp32", **nothing, **rest}
    (folder / MANIFEST).write_text(to_json(manifest))
    return Bundle.open(folder)


@pytest.mark.parametrize(("model", "chosen"), [("thinks", UNCHANGED), *CHOICES])
def test_a_bundle_opens_as_it_was_chosen(tmp_path: Path, model: str, chosen: Chosen) -> None:
    bundle = opened(tmp_path, MODELS[model], chosen=chosen)
    assert bundle.chosen == chosen and bundle.config == chosen.of(MODELS[model])


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"chosen": None},
        {"chosen": []},
        {"chosen": "layers"},
        {"chosen": {"layers": 2, "steps": 1}},
        {"chosen": {"layers": "2"}},
        {"chosen": {"layers": [2]}},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_say(tmp_path: Path, rest: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"{MANIFEST} is not whole") as raised:
        opened(tmp_path, THINKS, **rest)
    assert str(tmp_path) in str(raised.value) and "build the bundle again" in str(raised.value)


@pytest.mark.parametrize("chosen", [Chosen(layers=9), Chosen(engram_inside=True), Chosen(think_steps=2)])
def test_a_manifest_that_chooses_what_its_model_does_not_have(tmp_path: Path, chosen: Chosen) -> None:
    with pytest.raises(BadInput, match=r"layers 0:9|no Engram|no reasoning"):
        opened(tmp_path, PLAIN, chosen=chosen)


@pytest.mark.parametrize(
    "chosen",
    [
        {"layers": 1.5},
        {"think_steps": "2"},
        {"think_steps": 2.5},
        {"think_steps": -1},
        {"think_steps": [2]},
        {"layers": True},
        {"engram_inside": "yes"},
        {"draft": 1},
        {"state": "int4"},
        {"state": True},
    ],
)
def test_a_manifest_that_says_nonsense(tmp_path: Path, chosen: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        opened(tmp_path, THINKS, chosen=chosen)
