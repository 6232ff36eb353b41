"""What is foreseen beside what there is: refusals with the number that is missing, and what would fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command_line import call, start

from v4export import api, building, presets
from v4export.checkpoint.imagined import imagined
from v4export.config.sharding import Sharding
from v4export.engine.options import EngineOptions
from v4export.errors import BadInput, NotEnough
from v4export.package.bundle import Bundle
from v4export.plan import foreseen, verb
from v4export.plan.devices import DEVICES, find_device, target_of
from v4export.plan.fits import BY_LOSS, Machine, check_certain, larger_sharding, missing, smaller_recipe
from v4export.plan.stages import STAGES, Need, needs
from v4export.plan.verb import planned
from v4export.plan.work import Work
from v4export.precision import PRECISIONS, precision
from v4export.state_contract import bytes_per_token, fixed_bytes

GIB = 1 << 30
AMPLE = Machine(1 << 60, 1 << 60, 1 << 60)


def work(name: str, recipe: str = "bf16", **options) -> Work:
    config = presets.load(name)
    return Work(config, precision(recipe, config), imagined(config), options.pop("length", 4096), **options)


def test_devices_have_targets():
    for device in DEVICES.values():
        assert target_of(device.name) == (target_of(device.target)[0], device)
    assert find_device("RTX 4090") is DEVICES["rtx4090"] and find_device("A100_80GB") is DEVICES["a100-80g"]
    assert find_device("a100") is DEVICES["a100-40g"] and target_of("sm89")[1] is None
    with pytest.raises(BadInput, match="No target is called"):
        target_of("h2000")


def test_recipes_by_loss_are_recipes():
    assert {*BY_LOSS} == {name for name, p in PRECISIONS.items() if not p.inputs}


@pytest.mark.slow
def test_state_is_exact():
    for name in ("deepseek-v3", "deepseek-v4-flash", "deepseek-v4.1-flash", "tiny-v4x"):
        config, one = presets.load(name), work(name, length=2560, options=EngineOptions(max_batch=3))
        assert sum(one.state) == 3 * (2560 * bytes_per_token(config) + fixed_bytes(config))


def test_stages_follow_what_is_asked():
    assert [*needs(work("tiny-v3"))] == [name for name in STAGES if name != "weights for a CPU"]
    assert [*needs(work("tiny-v3", verify=False, engine=False))] == ["audit", "trace", "weights", "graph", "run"]
    copied = needs(work("tiny-v3", copied=True))["weights"]
    assert copied.certain_disk == work("tiny-v3").bytes.pointed_bytes and not needs(work("tiny-v3"))["weights"].disk


def test_each_lack_is_named():
    found = {
        "weights": Need(5 * GIB, disk=3 * GIB),
        "engine": Need(9 * GIB, mapped=6 * GIB),
        "run": Need(1, device=7 * GIB),
    }
    assert not missing(found, AMPLE)
    lacks = missing(found, Machine(8 * GIB, 4 * GIB, 2 * GIB, 6 * GIB))
    assert [str(one) for one in lacks] == [
        "weights: 1.0 GiB of memory missing, 5.0 GiB needed, 4.0 GiB there",
        "build: 1.0 GiB of disk missing, 3.0 GiB needed, 2.0 GiB there",
        "run: 1.0 GiB of device memory missing, 7.0 GiB needed, 6.0 GiB there",
    ]


@pytest.mark.slow
def test_advice_is_what_fits():
    one = work("deepseek-v2-lite", verify=False, engine=False)
    machine = replace(AMPLE, device=20 * GIB)
    assert smaller_recipe(one, machine, None) == "int8"  # the first by loss of those that 20 GiB hold
    assert smaller_recipe(one, machine, target_of("sm89")[0]) == "int8"
    assert smaller_recipe(one, replace(AMPLE, device=GIB), None) is None
    assert larger_sharding(one, machine) == Sharding(2, 2, 1)
    assert larger_sharding(one, AMPLE) is None
    found = planned(one, machine)
    assert found.advice == ("--precision int8 fits", "2 such devices hold it: --tp 2 --ep 2 --pp 1")
    with pytest.raises(NotEnough, match="too little device memory"):
        found.check()
    planned(one, AMPLE).check()


def test_a_build_is_refused_for_certain_reasons_alone():
    found = {"verify": Need(9 * GIB, least=2 * GIB), "weights": Need(1, disk=5 * GIB, certain_disk=3 * GIB)}
    check_certain(found, Machine(2 * GIB, 0, 3 * GIB))
    with pytest.raises(NotEnough, match=r"too little memory\n  verify: 1\.0 MiB of memory missing"):
        check_certain(found, Machine(2 * GIB - (1 << 20), 0, 3 * GIB))
    with pytest.raises(NotEnough, match=r"too little room\n  build: 1\.0 GiB of disk missing, 3\.0 GiB needed"):
        check_certain(found, Machine(2 * GIB, 0, 2 * GIB))


def test_a_build_that_cannot_end_well_is_not_begun(capfd, tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(foreseen, "this_machine", lambda out: Machine(1 << 40, 1 << 40, 1 << 10, folder="/somewhere"))
    monkeypatch.setattr(building, "account_of", None)  # nothing is scanned
    found = call(capfd, "export", tiny_checkpoint, "-o", tmp_path / "out", "--precision", "fp8")
    assert found.code == 3 and "the disk of /somewhere has too little room" in found.err and "missing" in found.err
    assert not list(tmp_path.iterdir())


def test_command(capfd, tiny_checkpoint, tmp_path):
    found = call(capfd, "plan", tiny_checkpoint, "--precision", "fp8", "--target", "h200", "-o", tmp_path / "out")
    assert found.code == 0 and found.err == ""
    rows = [line.split()[0] for line in found.out.splitlines()[:9]]
    assert rows == ["stage", "audit", "trace", "weights", "graph", "verify", "engine", "run", "all"]
    assert "here" in found.out and "139.00 GiB" in found.out and not (tmp_path / "out").exists()
    machine = ["--tp", 4, "--ep", 2, "--pp", 3, "--max-batch-size", 2, "--json"]
    spread = json.loads(call(capfd, "plan", "tiny-v3", *machine).out)
    assert spread["sharding"] == {"tp": 4, "ep": 2, "pp": 3} and [r["layers"] for r in spread["ranks"]] == [
        [0, 1], [1, 2], [2, 3],
    ]  # fmt: skip
    assert {*spread["stages"]["weights"]} >= {"host", "disk", "device", "seconds", "mapped", "least"}
    assert spread["bytes"]["pointed_bytes"] > 0 and not spread["missing"] and spread["machine"]["device"] is None


def test_command_refuses(capfd, monkeypatch):
    # What is advised has to fit this machine too.
    monkeypatch.setattr(verb, "this_machine", lambda out, device: replace(AMPLE, device=device))
    little = ["--device-memory-gib", 20, "--no-engine", "--no-verify"]
    found = call(capfd, "plan", "deepseek-v2-lite", *little)
    assert found.code == 3 and "run " in found.out
    assert (
        "error: there is too little device memory\n  run: " in found.err and "GiB of device memory missing" in found.err
    )
    assert "--precision int8 fits" in found.err and "2 such devices hold it: --tp 2 --ep 2 --pp 1" in found.err
    as_json = call(capfd, "plan", "deepseek-v2-lite", *little, "--json")
    lacks = json.loads(as_json.out)["missing"]
    assert as_json.code == 3 and [(one["stage"], one["what"]) for one in lacks] == [("run", "device memory")]
    assert call(capfd, "plan", "tiny-v3", "--tp", 3).code == 2
    assert call(capfd, "plan", "nonsense").code == 2
    blocks = call(capfd, "plan", "tiny-v3", "--precision", "int4")
    assert blocks.code == 4 and "--keep" in blocks.err


@pytest.mark.slow
def test_what_was_foreseen_stands_beside_what_it_took(capfd, tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    child = start("export", tiny_checkpoint, "-o", out, "--precision", "fp8", "-q")  # peaks are of a process
    assert child.wait() == 0, child.communicate()
    manifest = Bundle.open(out).manifest
    assert [*manifest["plan"]] == ["audit", "trace", "weights", "graph"] == [s["name"] for s in manifest["stages"]]
    costs = {one.name: one for one in api.costs(out)}
    assert costs["weights"].foreseen_bytes == costs["weights"].bytes == manifest["graphs"]["written_bytes"]
    assert costs["audit"].bytes is None and 0.2 < costs["graph"].foreseen_bytes / costs["graph"].bytes < 5
    for one in costs.values():
        assert 0.5 < one.foreseen_mib / one.mib < 2, one
    shown = call(capfd, "plan", out)
    assert shown.code == 0 and "time foreseen" in shown.out and "weights" in shown.out
    assert len(json.loads(call(capfd, "plan", out, "--json").out)["costs"]) == 4
