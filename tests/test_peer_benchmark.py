"""The benchmark of engines in turns, on tiny models: every row and column, and rows that say what failed."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from v4export import presets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import context_cost
import cpu
import peers
from page import PAGE
from subject import SUBJECTS

from v4export.checkpoint.count import parameter_counts
from v4export.config.readers import read_config, to_hub_config


def tiny_v3():
    """With widths that blocks of 32 divide."""
    widths = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "intermediate_size": 224}
    rest = {"qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 64, "max_position_embeddings": 1 << 14}
    return replace(presets.load("tiny-v3"), yarn=None, dtype="float32", **widths, **rest)


def tiny_v41():
    small = presets.load("tiny-v4.1")
    return replace(small, fp8=None, engram=None, image_token_id=None, dtype="float32", num_mtp_layers=0)


@pytest.mark.parametrize("name", SUBJECTS)
def test_subjects(name):
    title, make = SUBJECTS[name]
    config = make()
    said = float(re.search(r"([\d.]+)e9", title)[1])
    assert parameter_counts(config).total / 1e9 == pytest.approx(said, rel=0.03)
    assert read_config(to_hub_config(config)) == config


def test_cells_by_hand():
    cases = [*peers.CASES]
    seconds = dict(zip(cases, [[2.0, 4.0], [0.1, 0.2, 0.4], [0.5], [1.0]], strict=True))
    one = peers.Measured("it", 1e9, seconds, [3.0, 5.0], 1.5)
    cells = ["256.0 (192.0)", "10.0 (5.0)", "2.0 (2.0)", "1.0 (1.0)", "4.0", "1.50", "50.0", "25%"]
    assert one.cells(20.0) == cells
    seconds = {case: seconds[case] if case == cases[0] else [] for case in cases}
    part = replace(one, seconds=seconds, peak_gb=0.0, failed="over 9 s")
    assert part.cells(20.0) == [cells[0], "over 9 s", "", "", "4.0", "", "50.0", ""]
    none = replace(part, seconds={case: [] for case in cases}, start_s=[])
    assert none.cells(20.0) == ["over 9 s", *[""] * 7]


def test_a_part_alone_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "engines_of", lambda name, here, compiled: [name])
    monkeypatch.setattr(cpu, "measured", lambda engines, *how: [peers.Measured(*engines, 1e9, failed="it ended")])
    monkeypatch.setattr(cpu, "bandwidth", lambda: 2e10)
    text = PAGE.read_text()
    for part in cpu.PARTS:
        assert [text.count(mark) for mark in cpu.marks(part)] == [1, 1], part
    page = tmp_path / "page.md"
    page.write_text(text)
    done = CliRunner().invoke(cpu.main, ["--part", "v4", "--into", str(page)])
    assert not done.exception and done.output in page.read_text() + "\n"
    assert "| v4 | it ended |" in done.output and "2 threads reading 20.0 GB/s" in done.output
    begin, end = cpu.marks("v4")
    kept = [each.split(mark)[i] for each in (text, page.read_text()) for i, mark in enumerate((begin, end))]
    assert kept[:2] == kept[2:]


@pytest.fixture
def small(monkeypatch):
    for module in (peers, cpu):
        monkeypatch.setattr(module, "CASES", ((0, 8), (16, 1)))
    monkeypatch.setattr(peers, "bandwidth", lambda: 2e10)
    monkeypatch.setattr(cpu, "bandwidth", lambda: 2e10)
    monkeypatch.setattr(context_cost, "bandwidth", lambda: 2e10)
    for name, make in (("subject", tiny_v3), ("v41", tiny_v41)):
        monkeypatch.setitem(SUBJECTS, name, (name, make))


@pytest.mark.slow
def test_turns(small, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "OURS", (("fp32", 0, False), ("fp32", 0, True)))
    engines = peers.engines_of("subject", tmp_path, compiled=True)
    names = [one.name for one in engines]
    ours = ["v4export, fp32", "v4export, fp32 --kernels"]
    assert names[:4] == [*ours, "transformers, eager", "transformers, compiled"]
    assert len(names) in (4, 8)  # with the extra `bench`
    assert engines[0].reads == engines[1].reads == engines[2].reads
    # Compiling takes longer than that; and what cannot be opened ends its process.
    engines.append(peers.Engine("broken", int, ("no number",), 1.0))
    found = peers.measured(engines, rounds=2, steps=2, compile_limit_s=1e-3)
    failed = {one.name: one.failed for one in found if one.failed}
    assert failed == {"transformers, compiled": "over 0 s", "broken": "ended by itself"}
    for one in found:
        if not one.failed:
            assert [len(each) for each in one.seconds.values()] == [2, 4] and len(one.start_s) == 2
            assert 0.05 < one.peak_gb < 8
    table = cpu.table(found)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    assert {*names, "broken"} <= {*rows}
    number = r"[\d.]+"
    row = rf"\| v4export, fp32 \|( {number} \({number}\) \|){{2}}( {number} \|){{3}} \d+% \|"
    assert re.fullmatch(row, rows["v4export, fp32"])


@pytest.mark.slow
def test_the_cost_of_context(small, tmp_path, monkeypatch):
    monkeypatch.setattr(context_cost, "LAYOUTS", {"V3's layout": "subject", "V4.1's layout": "v41"})
    monkeypatch.setattr(context_cost, "CONTEXTS", (64, 128))
    page, chart = tmp_path / "page.md", tmp_path / "chart.svg"
    page.write_text(f"before {context_cost.BEGIN} old {context_cost.END} after")
    context_cost.main.callback(folder=tmp_path / "kept", rounds=1, steps=2, chart=chart, into=page)
    text, drawn = page.read_text(), chart.read_text()
    assert text.startswith("before ") and text.endswith(" after") and " old " not in text
    for held in ("64", "128"):
        assert re.search(rf"^\| {held} cached \|( [\d.]+ \([\d.]+\), \d+% \|){{2}}$", text, re.MULTILINE)
    for name in ("V3&#x27;s layout", "V4.1&#x27;s layout: floor"):
        assert name in drawn
    rows = [context_cost.floor_ms("V3's layout", held) for held in (64, 128)]
    assert rows[1] - rows[0] == pytest.approx(1e3 * 64 * tiny_v3().latent_dim * 4 * 3 / 2e10)
    assert np.isfinite(rows).all()
