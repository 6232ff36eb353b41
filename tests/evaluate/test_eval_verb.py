"""``v4export eval`` from the command line: what it prints, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from command_line import call
from traced import export_bundle

from v4export import api
from v4export.evaluate import budget

HELDOUT = Path(__file__).parents[2] / "examples" / "tiny-v3" / "heldout.txt"
SMALL = ("--text", HELDOUT, "--context", 16, "--tokens", 64, "-q")


@pytest.fixture(scope="module")
def bundle(trained_checkpoint, tmp_path_factory):
    return export_bundle(trained_checkpoint, tmp_path_factory.mktemp("eval") / "bundle", "fp8").folder


def test_a_table_and_files(capfd, trained_checkpoint, tmp_path):
    out = tmp_path / "out"
    found = call(capfd, "eval", trained_checkpoint, *SMALL, "--precision", "fp8,int4", "--state", "fp8", "-o", out)
    assert found.code == 0, found.err
    names = ["fp32", "fp8", "fp8 + fp8 state", "int4", "int4 + fp8 state"]
    lines = found.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(names)]] == names
    assert max(map(len, lines)) <= 120 and "60 tokens of" in lines[-1] and "4 windows of 16" in lines[-1]
    assert sorted(file.name for file in out.iterdir()) == ["eval.json", "eval.md", "eval.svg", "layers.svg"]
    stored = json.loads((out / "eval.json").read_text(), parse_constant=pytest.fail)
    assert [one["name"] for one in stored["recipes"]] == names and stored["scored"] == 60
    assert stored["recipes"][1]["quality"]["divergence"] > 0 and len(stored["recipes"][1]["layers"]) == 4
    table = [line for line in (out / "eval.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(names) and len({line.count("|") for line in table}) == 1
    for picture in ("eval.svg", "layers.svg"):
        drawn = ElementTree.parse(out / picture).getroot()
        shown = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
        # Once in each of two charts, but for rings; the reference has no logarithm.
        named = names[1:] if picture == "layers.svg" else ["fp8", "int4"]
        assert all(shown.count(name) == 2 for name in named) and "fp32" not in shown


def test_json_and_the_same_as_the_function(capfd, trained_checkpoint):
    printed = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, "--precision", "bf16", "--json").out)
    found = api.evaluate(trained_checkpoint, text=HELDOUT, context=16, tokens=64, precision=["bf16"])
    assert printed["recipes"][1]["quality"]["perplexity"] == found.recipes[1].quality.perplexity
    assert printed["text_tokens"] == found.text_tokens > 1000


def test_first_layers_alone(capfd, trained_checkpoint, tmp_path):
    out = tmp_path / "out"
    found = call(capfd, "eval", trained_checkpoint, *SMALL, "--precision", "int8", "--layers", "0:2", "-o", out)
    assert found.code == 0 and "first 2 of 4 layers: no perplexity" in found.out and "top-1" not in found.out
    assert sorted(file.name for file in out.iterdir()) == ["eval.json", "eval.md", "layers.svg"]
    assert json.loads((out / "eval.json").read_text())["recipes"][1]["quality"] is None


@pytest.mark.slow
def test_a_bundles_graph_is_measured_beside_its_recipe(capfd, bundle):
    pytest.importorskip("onnxruntime")
    found = json.loads(call(capfd, "eval", bundle, *SMALL, "--json").out)
    reference, recipe, graph = found["recipes"]
    assert (reference["name"], recipe["name"], graph["name"]) == ("fp32", "fp8", "graph (fp8)")
    one, other = recipe["quality"], graph["quality"]
    assert other["perplexity"] == pytest.approx(one["perplexity"], rel=0.01)
    assert 0.3 < other["divergence"] / one["divergence"] < 3 and other["divergence"] != one["divergence"]
    assert graph["bytes"] == recipe["bytes"]
    more = json.loads(call(capfd, "eval", bundle, *SMALL, "--precision", "bf16,fp8", "--json").out)
    assert [one["name"] for one in more["recipes"]] == ["fp32", "bf16", "fp8", "graph (fp8)"]
    assert more["recipes"][3]["quality"] == other


@pytest.mark.slow
def test_all_recipes_but_those_that_cannot_be_had(capfd, trained_checkpoint):
    found = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, "--json").out)
    names = [one["name"] for one in found["recipes"]]
    assert names[:3] == ["fp32", "fp16", "bf16"] and "fp8-w8a8" not in names
    assert any("fp8-w8a8 is left out" in note for note in found["notes"])


def test_exceptions_to_recipes(capfd, trained_checkpoint):
    keep = ("--precision", "int4", "--keep", "bf16:*.expert")
    found = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, *keep, "--json").out)
    kept = found["recipes"][1]
    plain = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, *keep[:2], "--json").out)["recipes"][1]
    assert kept["name"] == "int4 + keep" and kept["bytes"] > plain["bytes"]
    assert kept["layers"][3]["own"] < plain["layers"][3]["own"] / 2


def test_inputs_rounded_by_scales(capfd, trained_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(HELDOUT.read_text()[-2500:])
    how = ("--precision", "fp8-w8a8", "--calibrate", text)
    found = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, *how, "--json").out)
    rounded = found["recipes"][1]
    assert rounded["name"] == "fp8-w8a8"
    plain = json.loads(call(capfd, "eval", trained_checkpoint, *SMALL, "--precision", "fp8", "--json").out)
    assert rounded["layers"][0]["own"] > plain["recipes"][1]["layers"][0]["own"]


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--precision", "fp8,nonsense"], "nonsense"), (["--precision", "fp8-w8a8"], "--calibrate"),
     (["--tokens", "15"], "does not fill one window"), (["--context", "9999"], "cannot have 9999"),
     (["--layers", "1:2"], "not the first"), (["--keep", "bf16:nothing.at.all"], "nothing.at.all"),
     (["--text", "gone.txt"], "gone.txt")],
)  # fmt: skip
def test_what_cannot_be_done_leaves_nothing(capfd, trained_checkpoint, tmp_path, options, says):
    out = tmp_path / "out"
    found = call(capfd, "eval", trained_checkpoint, *SMALL, *options, "-o", out)
    assert found.code in (2, 4) and says in found.err and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(capfd, trained_checkpoint, tmp_path):
    (tmp_path / "mine").write_text("x")
    found = call(capfd, "eval", trained_checkpoint, *SMALL, "-o", tmp_path)
    assert found.code == 2 and "exists" in found.err and (tmp_path / "mine").read_text() == "x"


def test_a_layer_that_does_not_fit_is_refused(capfd, trained_checkpoint, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    found = call(capfd, "eval", trained_checkpoint, *SMALL, "--precision", "bf16")
    assert found.code == 3 and re.search(r"does not fit into memory\n.* GiB: [\d,]+ numbers", found.err)


def test_hidden_states_that_do_not_fit_wait_on_disk(trained_checkpoint, monkeypatch):
    how = {"text": HELDOUT, "context": 16, "tokens": 64, "precision": ["bf16"]}
    held = api.evaluate(trained_checkpoint, **how)

    plans = []
    original = budget.budget
    monkeypatch.setattr("v4export.evaluate.verb.budget", lambda *a: plans.append(original(*a)) or plans[-1])
    api.evaluate(trained_checkpoint, **how)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=plans[0].part_bytes))
    again = api.evaluate(trained_checkpoint, **how)
    assert not plans[0].on_disk and plans[1].on_disk
    assert again == held
