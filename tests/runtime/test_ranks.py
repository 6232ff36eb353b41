"""A model that is shared among ranks says what it says whole: all ranks in one process, and each in its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rank_logits
from small_models import small

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config.sharding import Sharding
from v4export.engine.options import EngineOptions
from v4export.errors import BadInput, NotSupported
from v4export.graphs.export import graphs_in
from v4export.graphs.ranks import Plan
from v4export.precision import precision as find_precision

ONE = Sharding()
#: With FP8 and FP4 as stored, whose shared experts can be cut between blocks of 128.
WIDE = replace(presets.load("tiny-v4-fp4"), moe_intermediate_size=256)
#: A model, and the ways in which it is shared here.
WAYS = {
    "tiny-v3": [Sharding(tp=2), Sharding(ep=2), Sharding(pp=2), Sharding(2, 2, 2), Sharding(4, 2), Sharding(ep=4)],
    "tiny-v3.2": [Sharding(2, 2, 2)],
    "tiny-v4": [Sharding(2, 2, 2)],
    "tiny-v4.1": [Sharding(pp=3), Sharding(ep=2, pp=2)],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """From a preset, a precision and a sharding, the bundle."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoint = functools.cache(
        lambda preset: synth(WIDE if preset == WIDE.family else small(preset), folder / preset)
    )

    @functools.cache
    def make(preset: str, sharding: Sharding = ONE, precision: str = "fp32") -> Path:
        out = folder / f"{preset} {precision} {sharding}"
        return api.export(checkpoint(preset), out, precision=precision, max_seq_len=64, sharding=sharding).bundle.folder

    return make


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "sharding"), [(p, s) for p, ways in WAYS.items() for s in ways], ids=str)
def test_all_ranks_in_one_process(shared, preset, sharding):
    whole = rank_logits.logits_of(shared(preset))
    assert (
        close(rank_logits.logits_of(shared(preset, sharding)), whole) and len(graphs_in(shared(preset, sharding))) > 1
    )


def started(bundle: Path, ranks: int, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [rank_logits.__file__, str(bundle), str(out)]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "sharding"),
    [
        ("tiny-v3", Sharding(tp=2)),
        ("tiny-v3", Sharding(ep=2)),
        ("tiny-v4.1", Sharding(pp=3)),
        ("tiny-v3", Sharding(2, 2, 2)),
        ("tiny-v3", Sharding(4, 2)),
    ],
    ids=str,
)
def test_each_rank_in_a_process_of_its_own(shared, preset, sharding, tmp_path):
    """By torchrun and gloo; every rank is told the logits, so that all choose the same tokens."""
    found = started(shared(preset, sharding), sharding.ranks, tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    whole = rank_logits.logits_of(shared(preset))
    said = [np.load(tmp_path / f"{rank}.npy") for rank in range(sharding.ranks)]
    assert close(said[0], whole) and all(np.array_equal(one, said[0]) for one in said)


@pytest.mark.slow
def test_too_few_ranks_are_told_how_many(shared, tmp_path):
    found = started(shared("tiny-v3", Sharding(2, 2, 2)), 2, tmp_path)
    assert found.returncode and "--nproc-per-node 4" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision", "sharding"),
    [
        ("tiny-v3", "bf16", Sharding(2, 1, 2)),
        ("tiny-v4", "fp32", Sharding(2, 2)),
        (WIDE.family, "native", Sharding(ep=2)),
    ],
)
def test_verified_at_every_layer(shared, preset, precision, sharding):
    found = api.verify(shared(preset, sharding, precision), decode=4)
    assert found.passed, [b for b in found.boundaries if not b.ok]
    assert "0 converted" not in found.boundaries[0].derivation or sharding.tp == 1


@pytest.mark.slow
def test_a_weight_of_another_rank_is_found(shared, tmp_path):
    """The graphs of two ranks, one for the other: what each reads is sound, and not its own."""
    folder = shared("tiny-v3", Sharding(ep=2))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.rglob("*"):
        target = copy / file.relative_to(folder)
        target.mkdir(exist_ok=True) if file.is_dir() else os.link(file, target)
    for kind in ("onnx", "cpu.onnx"):
        a, b = (folder / f"model.rank{i}.{kind}" for i in range(2))
        for source, target in ((a, b), (b, a)):
            (copy / target.name).unlink()
            os.link(source, copy / target.name)
    manifest = json.loads((copy / "v4export.json").read_text())
    for kind in ("onnx", "cpu.onnx"):
        files, names = manifest["files"], [f"model.rank{i}.{kind}" for i in range(2)]
        files[names[0]], files[names[1]] = files[names[1]], files[names[0]]
    (copy / "v4export.json").unlink()
    (copy / "v4export.json").write_text(json.dumps(manifest))
    found = api.verify(copy, decode=1)
    assert not found.boundaries[0].ok and "is read from" in found.boundaries[0].notes[0]


@pytest.mark.slow
def test_what_the_manifest_says(shared):
    manifest = json.loads((shared("tiny-v4.1", Sharding(ep=2, pp=2)) / "v4export.json").read_text())
    assert manifest["sharing"]["sharding"] == {"tp": 1, "ep": 2, "pp": 2}
    ranks = manifest["graphs"]["ranks"]
    assert [rank["stage"] for rank in ranks] == [0, 0, 1, 1] and not ranks[0]["receives"]
    (a, b), (c, d) = ranks[0]["layers"], ranks[2]["layers"]
    assert (a, d) == (0, 4) and b == c
    assert {f"hidden.{b - 1}", f"pre.{b - 1}"} <= {*ranks[2]["receives"]}
    assert ranks[0]["state"] == ranks[1]["state"] and ranks[2]["state"] == ranks[3]["state"]
    own = {int(name.split(".")[1]) for name in ranks[2]["state"]}
    assert {*range(c, d)} <= own, "and those of a layer before them whose entries they read"
    deal = manifest["sharing"]["deal"]["0"]
    assert sorted(e for hand in deal for e in hand) == list(range(small("tiny-v4.1").num_experts))


@pytest.mark.slow
def test_engines_of_ranks_hold_the_collectives(shared):
    pytest.importorskip("tensorrt_rtx")
    folder = shared("tiny-v3", Sharding(2, 2, 2), "bf16")
    reports = api.engine(folder, EngineOptions(targets=["sm89"], backend="tensorrt_rtx", max_chunk=8))
    assert [*reports] == [f"model.rank{rank}.onnx" for rank in range(4)]
    layers = [
        2 * (rank["layers"][1] - rank["layers"][0]) for rank in api.Bundle.open(folder).manifest["graphs"]["ranks"]
    ]
    assert [report.layers["DIST_COLLECTIVE"] for report in reports.values()] == layers


@pytest.mark.parametrize(
    ("load", "says"),
    [({0: [1.0]}, "layer 0's experts"), ({1: [1.0, 2.0]}, "2 counts"), ([1], "says nothing of experts")],
)
def test_a_load_of_other_experts(tiny_checkpoint, tmp_path, load, says):
    file = tmp_path / "load.json"
    file.write_text(json.dumps(load))
    how = {"scan_values": False, "sharding": Sharding(ep=2), "expert_load": file}
    with pytest.raises(BadInput, match=says):
        api.export(tiny_checkpoint, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "precision", "says"),
    [
        (presets.load("tiny-v4x"), "bf16", "reasoning layers(.|\\n)*--think-steps 0"),
        (replace(presets.load("tiny-v3"), attention_bias=True), "bf16", "biases"),
        (presets.load("tiny-v3"), "fp8-w8a8", "rounded"),
    ],
    ids=["thoughts", "biases", "inputs"],
)
def test_what_is_not_shared(config, precision, says):
    with pytest.raises(NotSupported, match=says):
        Plan.of(config, find_precision(precision, config), Sharding(tp=2))
