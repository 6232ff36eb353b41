"""Sound bundles pass with room to spare, and every way of being wrong that an exporter has fails where it is wrong."""

from __future__ import annotations

import re
import subprocess
import sys

import corruptions_v4
import pytest
from corruptions import CASES, top_k
from damaged import Damaged
from eager import EagerExecutor

from v4export import api
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.errors import NotSupported, NumbersDiffer
from v4export.precision import precision as find_precision
from v4export.verify.compare import compare, expected_boundaries
from v4export.verify.prompts import default_prompts
from v4export.verify.recording import record

PRECISIONS = ("fp32", pytest.param("bf16", marks=pytest.mark.slow), pytest.param("fp8", marks=pytest.mark.slow))
#: Those that quick tests look at, one of each kind: a pointer, a constant, an attribute, a node, a weight's value.
QUICK = {
    "down of two experts swapped", "routed scale 2.4 for 2.5", "epsilon 1e-3 in one layer", "no shared expert",
    "NaN in a weight",
}  # fmt: skip
RUNS = [
    pytest.param(precision, name, marks=() if precision == "fp32" and name in QUICK else pytest.mark.slow)
    for name, case in CASES.items()
    for precision in case.precisions
]


@pytest.mark.parametrize("precision", [*PRECISIONS, pytest.param("fp16", marks=pytest.mark.slow)])
def test_sound_bundles_pass_with_room(exported, precision):
    found = api.verify(exported(precision).folder, decode=16)
    assert found.passed and found.summary().startswith("PASSED | 4 layers, 4 prompts, ")
    names = [b.name for b in found.boundaries]
    assert names[:2] == ["weights", "embedding"] and names[-1] == "logits" and len(names) == 3 + 2 * 4
    assert found.boundaries[1].max_abs == 0
    assert_room(found.boundaries[2:])
    free = [b.carried for b in found.boundaries if b.carried is not None]
    assert len(free) == 5 and max(free) < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2, "fp8": 6e-2}[precision]
    assert all((b.weights or 0) > 0 for b in found.boundaries if b.weights is not None)
    assert any(b.weights for b in found.boundaries) == (precision in ("fp16", "fp8"))


@pytest.mark.parametrize(("precision", "name"), RUNS)
def test_damage_fails_where_it_is(exported, tmp_path, precision, name):
    damaged = Damaged(exported(precision).folder, tmp_path / "damaged")
    CASES[name].damage(damaged)
    damaged.save()
    found = api.verify(damaged.folder, decode=8)
    # References are checked by themselves; here the numbers have to tell.
    bad = [b for b in found.boundaries if not b.ok and b.name != "weights"]
    assert bad, name
    assert re.fullmatch(CASES[name].first, bad[0].name), (bad[0].name, bad[0].notes)
    assert bad[0].notes and found.summary().startswith("FAILED | ")
    with pytest.raises(NumbersDiffer, match=f"part at (weights|{bad[0].name})") as raised:
        found.check()
    assert raised.value.exit_code == 1 and raised.value.summary == found.summary()


#: Preset -> its damages.
NEWER = {"tiny-v4": corruptions_v4.V4, "tiny-v3.2": corruptions_v4.V32}
NEWER_RUNS = [
    (preset, precision, name)
    for preset, cases in NEWER.items()
    for name, case in cases.items()
    for precision in case.precisions
]
NEWER_SOUND = [
    (preset, precision)
    for preset, precisions in {
        "tiny-v4": ("fp32", "fp16", "bf16", "fp8"),
        "tiny-v4-fp4": ("mxfp4",),
        "tiny-v3.2": ("fp32", "bf16"),
    }.items()
    for precision in precisions
]


def assert_room(boundaries):
    for boundary in boundaries:
        assert 0 < boundary.rel * 1.5 < boundary.limit, boundary
        assert 0 < boundary.mean * 1.3 < boundary.mean_limit, boundary


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "precision"), NEWER_SOUND)
def test_sound_bundles_of_v3_2_and_v4_pass_with_room(random_bundle, preset, precision):
    bundle = random_bundle(preset, precision)
    found = api.verify(bundle.folder, decode=16)
    assert found.passed and found.layers == bundle.config.num_layers, found.boundaries[0].notes
    assert len(found.boundaries) == expected_boundaries(bundle.config)
    assert found.boundaries[1].max_abs == 0
    assert_room(found.boundaries[2:])
    indexed = [b for b in found.boundaries if b.selective]
    assert len(indexed) == {"tiny-v4": 2, "tiny-v4-fp4": 2, "tiny-v3.2": 3}[preset]
    assert (found.ties > 0) == any(b.verdict == "AMBIGUOUS" for b in found.boundaries)
    assert all(bool(b.evidence) == bool(b.ties) for b in found.boundaries)
    names = [b.name for b in found.boundaries]
    if preset == "tiny-v4":
        assert names[2:5] == ["layer 0 window hash", "layer 0 window keys", "layer 1 csa hash"]
        assert names[5:10] == [f"layer 1 csa {t}" for t in ("keys", "entry", "open", "index_key", "index_open")]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "precision", "name"), NEWER_RUNS)
def test_damage_to_v3_2_and_v4_fails_where_it_is(random_bundle, tmp_path, preset, precision, name):
    damaged = Damaged(random_bundle(preset, precision).folder, tmp_path / "damaged")
    case = NEWER[preset][name]
    case.damage(damaged)
    damaged.save()
    found = api.verify(damaged.folder, decode=8)
    bad = [b for b in found.boundaries if not b.ok and b.name != "weights"]
    assert bad, name
    assert re.fullmatch(case.first, bad[0].name), (bad[0].name, bad[0].notes)
    assert bad[0].notes and bad[0].verdict == "FAIL" and found.summary().startswith("FAILED | ")


@pytest.mark.parametrize("preset", ["tiny-v4", "tiny-v3.2"])
def test_the_definition_run_in_chunks_agrees_with_itself(random_checkpoint, tmp_path, preset):
    checkpoint = Checkpoint.open(random_checkpoint(preset))
    weights, config, precision = audit(checkpoint).weights, checkpoint.config, find_precision("bf16")
    executor = EagerExecutor(weights, config, precision)
    prompts = default_prompts(tmp_path, config, 150)
    recordings = record(executor, config, prompts, chunk=37, decode=3)
    boundaries = compare(weights, config, precision, recordings)
    assert all(b.ok for b in boundaries), [b for b in boundaries if not b.ok]
    assert_room(boundaries[1:])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("count", [3, 5])
def test_another_number_of_experts(exported, tmp_path, precision, count):
    damaged = Damaged(exported(precision).folder, tmp_path / "damaged")
    top_k(count)(damaged)
    damaged.save()
    if precision == "bf16":  # its graph has shapes everywhere, and onnxruntime compares them
        with pytest.raises(NotSupported, match="onnxruntime cannot run the graph"):
            api.verify(damaged.folder, decode=2)
        return
    found = api.verify(damaged.folder, decode=2)
    bad = [b for b in found.boundaries if not b.ok and b.name != "weights"]
    assert bad[0].name == "layer 1 routed" and f"sequence 0, {count} experts taken for a token, not 4" in bad[0].notes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.cpu.onnx", "weights"])
def test_damaged_files_are_refused(exported, tmp_path, name):
    damaged = Damaged(exported("fp32").folder, tmp_path / "damaged")
    file = damaged.folder / name
    if file.is_dir():
        for weights in file.iterdir():
            weights.unlink()
            weights.write_bytes(b"short")
    else:
        file.unlink()
        file.write_bytes(b"\xff" * 100)
    result = subprocess.run(
        [sys.executable, "-c", "from v4export.cli import main; main()", "verify", str(damaged.folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "has changed since it was built" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and "PASSED" not in result.stdout


def test_short_prompts_are_judged_too(exported):
    found = api.verify(exported("fp32").folder, prompts=[[5]], decode=0)
    assert (
        found.passed and found.prompts == (1,) and found.boundaries[2].mean_limit == pytest.approx(1 + 5 / 2**0.5)
    )  # one token through the fast copy, one through the bodies


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_wrong_body_fails_though_the_fast_copy_is_sound(exported, tmp_path, precision):
    damaged = Damaged(exported(precision).folder, tmp_path / "damaged")
    for function in damaged.model.functions:
        for node in function.node:
            if function.name == "MoeExperts" and node.op_type == "Sigmoid":
                node.op_type = "Tanh"
    damaged.save_portable()
    found = api.verify(damaged.folder, decode=2)
    bad = [b for b in found.boundaries if not b.ok]
    assert found.bodies and [b.name for b in bad[:2]] == ["weights", "layer 1 routed"]
