"""The file of scales by which inputs are rounded: written, read, and refused where it is not the model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from v4export import presets
from v4export.checkpoint.activation_scales import (
    ActivationScales,
    all_scales,
    check_checkpoint,
    read_scales,
    wanted_scales,
)
from v4export.errors import BadInput
from v4export.precision import precision

CONFIG = presets.load("tiny-v3")
FAMILIES = ("tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x", "tiny-kimi-k2")


def scales(config=CONFIG) -> ActivationScales:
    rng = np.random.default_rng(0)
    values = {n: np.array(rng.random(shape) + 0.01, np.float32) for n, shape in all_scales(config).items()}
    return ActivationScales(values, "ab" * 32, {"method": "max", "tokens": 100})


def test_a_round_trip(tmp_path):
    file, written = tmp_path / "a.safetensors", scales()
    written.write(file)
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    found = read_scales(file, CONFIG)
    assert (found.checkpoint, found.made) == (written.checkpoint, written.made)
    assert [*found.values] == [*all_scales(CONFIG)]
    for name, value in written.values.items():
        np.testing.assert_array_equal(found.values[name], value)
    assert {name: v.shape for name, v in load_file(file).items()} == all_scales(CONFIG), "others can read it, too"


@pytest.mark.parametrize("preset", FAMILIES)
def test_names(preset):
    config = presets.load(preset)
    found = all_scales(config)
    for name, shape in found.items():
        assert shape == ((config.num_experts,) if ".experts." in name else ())
        assert name.endswith(".input_scale") or (name.endswith(".experts.middle_scale"))
    assert not [name for name in found if "kv_b_proj" in name or "o_a_proj" in name or "lm_head" in name]
    experts = [name for name in found if ".experts." in name]
    assert len(experts) == 2 * len(config.moe_layers)
    query = "q_a_proj" if config.q_lora_rank else "q_proj"
    assert {f"model.layers.{i}.self_attn.{query}.input_scale" for i in range(config.num_layers)} <= found.keys()


def test_a_recipes_own():
    every = scales().values
    recipe = precision("fp8-w8a8", CONFIG)
    assert [*wanted_scales(every, CONFIG, recipe)] == [*every]
    kept = precision("fp8-w8a8", CONFIG, ["bf16:layers.0.*", "fp8:*.o_proj", "int4:layers.1.mlp.experts"])
    wanted = wanted_scales(every, CONFIG, kept)
    assert every.keys() - wanted.keys() == {
        n for n in every if n.startswith("model.layers.0.") or n.startswith("model.layers.1.mlp.experts.")
    }
    assert not wanted_scales(every, CONFIG, precision("fp8", CONFIG))


def test_layers_that_are_left_out_may_have_scales(tmp_path):
    file, fewer = tmp_path / "a.safetensors", CONFIG.first_layers(2)
    scales().write(file)
    assert [*read_scales(file, fewer).values] == [*all_scales(fewer)]
    thinking = presets.load("tiny-v4x")
    scales(thinking).write(file)
    assert thinking.reasoning
    plain = dataclasses.replace(thinking, reasoning=dataclasses.replace(thinking.reasoning, steps=0))
    assert [*read_scales(file, plain).values] == [*all_scales(plain)] != [*all_scales(thinking)]


O_PROJ, EXPERTS = "model.layers.0.self_attn.o_proj.input_scale", "model.layers.1.mlp.experts.middle_scale"


def changed(values: dict[str, np.ndarray], name: str, value: object) -> None:
    values[name] = np.asarray(value, np.float32)


#: What is wrong -> how it becomes so, and what the error says.
FAULTS = {
    "missing": (lambda v: v.pop(O_PROJ), f"1 missing: {O_PROJ}"),
    "of nothing": (lambda v: changed(v, "model.layers.0.mlp.nothing.input_scale", 1), "1 of no module: .*nothing"),
    "of kv_b_proj": (lambda v: changed(v, "model.layers.0.self_attn.kv_b_proj.input_scale", 1), "1 of no module"),
    "shape": (lambda v: changed(v, EXPERTS, [1, 2, 3]), f"1 of the wrong shape or type: {EXPERTS}"),
    "one for a linear layer": (lambda v: changed(v, O_PROJ, [1]), "1 of the wrong shape or type"),
    "type": (lambda v: v.update({O_PROJ: np.array(1, np.float16)}), "1 of the wrong shape or type"),
    "zero": (lambda v: changed(v, O_PROJ, 0), f"1 not positive numbers: {O_PROJ}"),
    "negative": (lambda v: changed(v, EXPERTS, -v[EXPERTS]), f"1 not positive numbers: {EXPERTS}"),
    "NaN": (lambda v: changed(v, O_PROJ, np.nan), "1 not positive numbers"),
    "infinite": (lambda v: changed(v, O_PROJ, np.inf), "1 not positive numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_models_is_refused(tmp_path, fault):
    file, values = tmp_path / "a.safetensors", dict(scales().values)
    damage, said = FAULTS[fault]
    damage(values)
    save_file(values, file, {"format": "v4export activation scales 1", "checkpoint": "ab" * 32, "made": "{}"})
    with pytest.raises(BadInput, match=said) as raised:
        read_scales(file, CONFIG)
    assert "v4export calibrate" in raised.value.fix


def plain_weights(file: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, file)


def text(file: Path) -> None:
    file.write_text("It was the best of times.")


def half(file: Path) -> None:
    scales().write(file)
    file.write_bytes(file.read_bytes()[:-100])


def no_file(file: Path) -> None:
    pass


def without_a_checkpoint(file: Path) -> None:
    save_file(dict(scales().values), file, {"format": "v4export activation scales 1", "made": json.dumps({})})


@pytest.mark.parametrize("make", [plain_weights, text, half, no_file, without_a_checkpoint])
def test_other_files_are_refused(tmp_path, make):
    file = tmp_path / "a.safetensors"
    make(file)
    with pytest.raises(BadInput):
        read_scales(file, CONFIG)


def test_scales_of_another_checkpoint_are_refused(tmp_path):
    found = scales()
    check_checkpoint(found, tmp_path / "a", "ab" * 32)
    with pytest.raises(BadInput, match="made of another checkpoint\n  header hash abababababab, this one has cdcd"):
        check_checkpoint(found, tmp_path / "a", "cd" * 32)
