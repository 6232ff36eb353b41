"""Recipes that round inputs: sound bundles pass with room, and a rounding that is wrong or missing is found."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from damaged import Damaged
from traced import export_bundle

from v4export import api
from v4export.checkpoint.activation_scales import FILE, ActivationScales, all_scales, read_scales
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import read_header
from v4export.errors import BadInput
from v4export.package.bundle import Bundle
from v4export.precision import precision
from v4export.verify import tolerance
from v4export.verify.tolerance import E4M3_SPACING
from v4export.verify.tolerance import Path as Part

O_PROJ, GATE = "model.layers.1.self_attn.o_proj.input_scale", "model.layers.0.mlp.gate_proj.input_scale"
EXPERTS, MIDDLE = (f"model.layers.2.mlp.experts.{name}" for name in ("input_scale", "middle_scale"))


@pytest.fixture(scope="session")
def rounded(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The trained example, calibrated with its held-out text where that is there, else with prose."""
    folder = tmp_path_factory.mktemp("rounded")
    text, scales = trained_checkpoint / "heldout.txt", folder / "scales.safetensors"
    if not text.exists():
        text = folder / "text.txt"
        text.write_text("It was the best of times, it was the worst of times. " * 200)
    try:
        api.calibrate(trained_checkpoint, scales, text=text, tokens=4096, context=128)
    except BadInput:  # a random checkpoint has no tokenizer
        config = Checkpoint.open(trained_checkpoint).config
        values = {name: np.full(shape, 0.02, np.float32) for name, shape in all_scales(config).items()}
        ActivationScales(values, Checkpoint.open(trained_checkpoint).header_hash).write(scales)
    return export_bundle(trained_checkpoint, folder / "fp8-w8a8", "fp8-w8a8", calibrate=scales)


def verified(bundle: Path):
    return api.verify(bundle, decode=4)


@pytest.mark.slow
def test_sound_bundles_pass_with_room(rounded):
    found = verified(rounded.folder)
    assert found.passed
    for b in (b for b in found.boundaries if b.limit):
        assert b.rel < 0.6 * b.limit and b.mean < 0.8 * b.mean_limit, b.name
    # What rounding costs is seen: far more than bfloat16's own error, and a few percent.
    lost = [b.weights for b in found.boundaries if b.weights is not None]
    assert len(lost) == 4 and all(5e-3 < one < 0.1 for one in lost)
    assert rounded.manifest["graphs"]["lint"]["rounded_inputs"] == 4 * 4 + 3 + 3 * (3 + 1)


def write_scale(d: Damaged, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Change a scale in the file of converted weights, which the manifest will have a hash of."""
    (file,) = (d.folder / "weights").glob("converted-*")
    own = file.read_bytes()
    file.unlink()
    file.write_bytes(own)
    tensor = read_header(file)[1][name]
    values = tensor.read().reshape(-1)
    change(values)
    data = bytearray(own)
    data[tensor.offset : tensor.offset + tensor.nbytes] = values.tobytes()
    file.write_bytes(bytes(data))


def half_more(which: int = 0) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[which] *= 1.5

    return change


def unrounded(d: Damaged, scale: str) -> None:
    """Leave out the two nodes of one linear layer."""
    (narrow,) = [n for n in d.model.graph.node if n.op_type == "QuantizeLinear" and scale in n.input]
    (wide,) = [n for n in d.model.graph.node if n.op_type == "DequantizeLinear" and narrow.output[0] in n.input]
    readers = [n for n in d.model.graph.node if wide.output[0] in n.input]
    assert readers
    for reader in readers:
        reader.input[list(reader.input).index(wide.output[0])] = narrow.input[0]
    for node in (narrow, wide):
        d.model.graph.node.remove(node)


def scales_of_another_layers_experts(d: Damaged) -> None:
    (node,) = [n for n in d.nodes("MoeExperts") if n.name.startswith("layers.2.")]
    node.input[-2:] = [name.replace("layers.2", "layers.1") for name in (EXPERTS, MIDDLE)]


def scales_of_experts_swapped(d: Damaged) -> None:
    (node,) = [n for n in d.nodes("MoeExperts") if n.name.startswith("layers.2.")]
    node.input[-2], node.input[-1] = node.input[-1], node.input[-2]


def unrounded_in_the_fast_copy(d: Damaged) -> None:
    d.lower()
    unrounded(d, O_PROJ)


def experts_unrounded_in_the_fast_copy(d: Damaged) -> None:
    """What one of the loop's two roundings returns is replaced by what it reads."""
    d.lower()
    (loop,) = [n for n in d.model.graph.node if n.op_type == "Loop" and n.name.startswith("layers.2.")]
    body = loop.attribute[0].g
    (gather,) = [n for n in body.node if MIDDLE in n.input]
    (divide,) = [n for n in body.node if n.op_type == "Div" and gather.output[0] in n.input]
    (multiply,) = [n for n in body.node if n.op_type == "Mul" and gather.output[0] in n.input]
    for node in body.node:
        for i, name in enumerate(node.input):
            if name == multiply.output[0]:
                node.input[i] = divide.input[0]


#: Name -> a damage, and what the first note says of it.
DAMAGES: dict[str, tuple[Callable[[Damaged], None], str]] = {
    "scale of one module": (lambda d: write_scale(d, O_PROJ, half_more()), f"{O_PROJ}: its bytes are not the calib"),
    "scale of one expert": (lambda d: write_scale(d, MIDDLE, half_more(5)), f"{MIDDLE}: its bytes are not the calib"),
    "scale of another module": (lambda d: d.point(O_PROJ, d.place(GATE)), f"{O_PROJ} is read from .* and lies in"),
    "scales of experts swapped": (scales_of_experts_swapped, "layers.2.* rounds by .*middle_scale and .*input_scale"),
    "a rounding left out": (lambda d: unrounded(d, O_PROJ), "o_proj.weight multiplies is rounded by nothing"),
    "scales of another layer's experts": (scales_of_another_layers_experts, r"rounds by model\.layers\.1\."),
    "a rounding left out in the fast copy": (unrounded_in_the_fast_copy, "o_proj.weight multiplies is rounded by noth"),
    "experts' in the fast copy": (experts_unrounded_in_the_fast_copy, f"{MIDDLE} rounds the inputs of 0 products"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(rounded, tmp_path, name):
    damaged = Damaged(rounded.folder, tmp_path / "damaged")
    damage, note = DAMAGES[name]
    damage(damaged)
    damaged.save()
    found = verified(damaged.folder)
    weights = found.boundaries[0]
    assert not found.passed and weights.name == "weights" and not weights.ok
    assert any(re.search(note, line) for line in weights.notes), weights.notes


@pytest.mark.slow
@pytest.mark.parametrize("change", ["another checkpoint", "other scales", "no file"])
def test_the_bundles_scales_are_its_own(rounded, tmp_path, change):
    folder = Path(shutil.copytree(rounded.folder, tmp_path / "copy"))
    stored = read_scales(folder / FILE, rounded.config)
    if change == "no file":
        (folder / FILE).unlink()
    elif change == "another checkpoint":
        ActivationScales(stored.values, "0" * 64, stored.made).write(folder / FILE)
    else:
        values = {name: value * np.float32(1.5) for name, value in stored.values.items()}
        ActivationScales(values, stored.checkpoint, stored.made).write(folder / FILE)
    with pytest.raises(BadInput, match="has changed since it was built"):
        api.verify(folder)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_how_rounding_enlarges_errors(times):
    """Two copies of numbers that are a little apart, rounded to E4M3 again and again with fresh errors of no size."""
    rng = np.random.default_rng(times)
    n, e = 200_000, 2e-3
    x = rng.normal(size=n)
    y = x + e * rng.normal(size=n)
    for _ in range(times):
        # Sums of many numbers ahead of each rounding make errors bell-shaped again.
        scale = 2.0 ** rng.uniform(0, 1)
        pair = [(v * scale).astype(ml_dtypes.float8_e4m3fn).astype(float) / scale for v in (x, y)]
        difference = np.sqrt(np.square(pair[1] - pair[0]).mean() / np.square(pair[0]).mean())
        x = rng.normal(size=n)
        y = x + difference * rng.normal(size=n)
    assert difference == pytest.approx(tolerance.enlarged(e, times), rel=0.15)
    assert tolerance.enlarged(e, times) == pytest.approx(E4M3_SPACING ** (1 - 0.5**times) * e**0.5**times)


def test_only_recipes_that_round_inputs_have_wider_limits():
    part = Part("feed-forward", 5, 1000, 2, 2)
    plain, wide = precision("fp8"), precision("fp8-w8a8")
    assert part.error(plain) == part.unrounded(plain) == part.unrounded(wide) < part.error(wide)
    assert part.error(wide) == tolerance.enlarged(part.unrounded(wide), 2) < 2 * E4M3_SPACING
    assert "enlarged by 2 roundings" in part.derivation(wide) and "enlarged" not in part.derivation(plain)
    assert math.isclose(tolerance.enlarged(0.3, 2), 0.3), "what is larger than a spacing stays what it is"
