"""Graphs that keep cached rows as E4M3 pass with room, whatever falls to which side; damaged ones do not."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import corruptions_state
import literal_rows
import numpy as np
import pytest
import torch
from damaged import Damaged
from eager import EagerExecutor
from traced import export_bundle

from v4export import api
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.precision import precision as find_precision
from v4export.verify import narrow_rows
from v4export.verify.compare import compare, expected_boundaries
from v4export.verify.prompts import default_prompts
from v4export.verify.recording import record

QUICK = {"cached rows are not multiplied", "no multipliers"}
RUNS = [
    pytest.param(precision, name, marks=() if precision == "fp32" and name in QUICK else pytest.mark.slow)
    for name, case in corruptions_state.CASES.items()
    for precision in ("fp32", "bf16")
    if precision in case.precisions
]


@pytest.fixture(scope="module")
def narrow(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """From a precision, the bundle of the trained example that keeps its cached rows as E4M3."""
    folder = tmp_path_factory.mktemp("narrow")
    return functools.cache(
        lambda precision: export_bundle(trained_checkpoint, folder / precision, precision, state="fp8")
    )


@pytest.mark.parametrize("precision", ["fp32", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bf16", "fp8"))])
def test_sound_bundles_pass_with_room(narrow, precision):
    bundle = narrow(precision)
    found = api.verify(bundle.folder, decode=16)
    assert found.passed and len(found.boundaries) == expected_boundaries(bundle.config) == 3 + 4 * 4
    parts = ["", " multipliers", " rotated"]
    assert [b.name for b in found.boundaries[2:6]] == ["layer 0 dense", *(f"layer 0 latent{part}" for part in parts)]
    for boundary in found.boundaries[2:]:
        assert boundary.rel * 1.5 < boundary.limit and boundary.mean * 1.3 <= boundary.mean_limit, boundary
    assert 5e-4 < found.boundaries[-1].carried < 6e-2, "what rounding costs, against a definition that does not"


@pytest.mark.parametrize(("precision", "name"), RUNS)
def test_damage_fails_where_it_is(narrow, tmp_path, precision, name):
    damaged, case = Damaged(narrow(precision).folder, tmp_path / "damaged"), corruptions_state.CASES[name]
    case.damage(damaged)
    damaged.save()
    bad = [b for b in api.verify(damaged.folder, decode=8).boundaries if not b.ok and b.name != "weights"]
    assert bad and re.fullmatch(case.first, bad[0].name), [(b.name, b.rel, b.limit, b.notes) for b in bad]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny-v3.2", "tiny-v4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_definition_run_in_chunks_agrees_with_itself(random_checkpoint, tmp_path, preset, precision):
    """Windows, entries and index keys, too; in float32 some number falls to the other side."""
    checkpoint = Checkpoint.open(random_checkpoint(preset))
    weights, how = audit(checkpoint).weights, find_precision(precision)
    config = replace(checkpoint.config, state_fp8=True)
    executor = EagerExecutor(weights, config, how)
    recordings = record(executor, config, default_prompts(tmp_path, config, 150), chunk=37, decode=3)
    boundaries = compare(weights, config, how, recordings)
    assert len(boundaries) + 1 == expected_boundaries(config)
    for boundary in boundaries[1:]:
        assert boundary.ok and boundary.rel * 1.5 < boundary.limit, boundary


def test_nearest_is_the_nearest_number_that_is_rounded_to_the_same():
    """By looking at many numbers: none that is rounded to the graph's is nearer to the reference's."""
    reference, numbers = np.random.default_rng(0).standard_normal((2, 1, 64)).astype(np.float32) * 3
    numbers = np.array([[literal_rows.nearest(x) for x in numbers[0]]], np.float32)
    scale = np.array([[0.7]], np.float32)
    found = narrow_rows._nearest(*map(torch.from_numpy, (reference, numbers, scale)))[0].numpy()
    dense = np.linspace(-12, 12, 24_001)
    rounded = np.array([literal_rows.nearest(x) for x in dense])
    for x, q, near in zip(reference[0], numbers[0], found, strict=True):
        best = np.abs(dense[rounded == q] * scale[0, 0] - x).min()
        assert abs(abs(near - x) - best) < 1e-3, (x, q, near)


def test_numbers_that_are_none_are_not_near():
    row = torch.zeros(1, 64)
    numbers = row.clone()
    numbers[0, 3] = torch.nan
    found = narrow_rows._nearest(row, numbers, torch.ones(1, 1))
    assert found.isnan().tolist() == numbers.isnan().tolist()
    assert narrow_rows._nearest(row, row, torch.full((1, 1), torch.nan)).isnan().all()
