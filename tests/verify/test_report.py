"""The report is strict JSON and one page of HTML that needs nothing else and believes nobody."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from v4export import presets
from v4export.engine.build import EngineReport
from v4export.plain import to_json
from v4export.plan.foreseen import Cost
from v4export.verify.boundary import Boundary
from v4export.verify.report import line, write_report
from v4export.verify.verification import Verification

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}"
LINT = SimpleNamespace(
    nodes_per_layer={"dense": 55, "routed": 61},
    bodies=("v4::MoeRoute", HOSTILE),
    formats={f"experts.*.{HOSTILE}": {"fp8": 12, "bf16": 1}},
)
GOOD = Boundary(
    "layer 0 dense", True, 1e-3, 4e-4, 1e-2, 0.99998, "attention: 6*sqrt(..)", 0.6, 1.2, carried=1e-3,
    spread=(0, 0, 3, 9, 20, 4, 0, 0), load=(5, 0, 31, 0),
)  # fmt: skip
BAD = Boundary(
    "layer 1 routed", False, math.nan, math.inf, 1e-2, math.nan, "d", math.nan, 1.2, ties=3, notes=(f"took {HOSTILE}",),
    spread=(0, 0, 0, 0, 0, 30, 3, 3),
)  # fmt: skip
TIED = Boundary(
    "layer 2 csa", True, 1e-3, 4e-4, 1e-2, 0.99998, "d", 0.6, 1.2, ties=2, selective=(7, 9),
    evidence=(f"sequence 0, token 5: selected {HOSTILE}",),
)  # fmt: skip
COST = Cost(f"trace {HOSTILE}", 2.5, 1.0, 12.0, 10.0, None, None)
ENGINE = EngineReport(
    path=Path("model.engine"), bytes=3 << 20, sha256="ab", backend="tensorrt_rtx", backend_version="1.2.3",
    targets=("sm89", "sm120"), precision="bf16", plugins="none", max_batch=1,
    layers={"MATRIX_MULTIPLY": 7}, dtypes={"BF16": 9},
    proofs=[("weights are stored as bf16", "constants in the plan: bf16 12 MiB"), (HOSTILE, HOSTILE)],
    warnings=[f"careful {HOSTILE}"], seconds=1.5, peak_mib=100.0, weights_mib=12.0, activations_mib=3.0,
)  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def facts():
    return {
        "precision": "bf16", "max_seq_len": 512, "command": f"v4export build {HOSTILE}",
        "checkpoint": {"path": f"/{HOSTILE}", "header_sha256": "0123456789abcdef0123"},
        "audit": {"summary": "201 tensors used", "skipped_tensors": {"a": HOSTILE, "b": "left out layers"}},
        "graphs": SimpleNamespace(nodes=9, cpu_nodes=12, pointed_bytes=1 << 20, written_bytes=0, lint=LINT),
        "versions": {"torch": "2.13.0", "onnxruntime": HOSTILE},
        "stages": [SimpleNamespace(name="trace", seconds=1.0, peak_mib=10.0)],
    }  # fmt: skip


def written(folder, boundaries=(GOOD,), engine=None):
    verification = Verification("cpu", (1, 7), 8, tuple(boundaries)) if boundaries is not None else None
    engines = {"model.onnx": engine} if engine else {}
    write_report(folder, facts(), presets.load("tiny-v3"), verification, engines, [COST])

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    report = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return report, (folder / "report.html").read_text()


def test_json(tmp_path):
    report, _ = written(tmp_path, (GOOD, BAD), ENGINE)
    assert report["verdict"] == "FAILED | 2 layers, 2 prompts, 3 near-ties"
    good, bad = report["verification"]["boundaries"]
    assert (good["name"], good["rel"], good["ok"], good["mean"]) == ("layer 0 dense", 4e-4, True, 0.6)
    assert (bad["rel"], bad["max_abs"], bad["cos"], bad["ok"]) == (None, None, None, False)
    assert report["engines"]["model.onnx"]["proofs"][0] == [
        "weights are stored as bf16",
        "constants in the plan: bf16 12 MiB",
    ]
    assert report["engines"]["model.onnx"]["path"] == "model.engine" and report["facts"]["precision"] == "bf16"


def test_what_was_foreseen_stands_beside_what_was_measured(tmp_path):
    report, source = written(tmp_path)
    assert report["costs"][0]["foreseen_seconds"] == 2.5 and report["costs"][0]["seconds"] == 1.0
    cells = re.findall(r'<td class="n">([^<]*)</td>', source.partition("What it cost")[2])
    assert cells == ["1.0", "~2.5", "10", "~12", "", ""]


def test_what_is_ambiguous_passes_and_shows_its_evidence(tmp_path):
    report, source = written(tmp_path, (GOOD, TIED))
    assert report["verdict"] == "PASSED | 2 layers, 2 prompts, 2 near-ties"
    good, tied = report["verification"]["boundaries"]
    assert (good["verdict"], tied["verdict"], tied["evidence"]) == ("PASS", "AMBIGUOUS", list(TIED.evidence))
    assert TIED.also(("wrong",)).verdict == "FAIL" and BAD.verdict == "FAIL"
    text = Page(source).text
    assert "~ layer 2 csa" in text and TIED.evidence[0] in text and "7/9" in text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_does_not_have(value):
    text = to_json({"a": [value, 1.5], "b": GOOD, 3: Path("x"), "c": (None, True)})
    assert json.loads(text) | {"b": None} == {"a": [None, 1.5], "b": None, "3": "x", "c": [None, True]}
    assert "NaN" not in text and "Infinity" not in text


def test_page_is_self_contained_and_escaped(tmp_path):
    _, source = written(tmp_path, (GOOD, BAD), ENGINE)
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "onload", "onclick"}
    assert not re.search(r"https?://|url\(|@import", source)
    assert source.count("<script") == 0 and page.text.count("<script>alert(1)</script>") >= 7
    assert "49" not in page.text and "{{ 7*7 }}" in page.text  # what a checkpoint says is never a template


def test_page_says_everything(tmp_path):
    _, source = written(tmp_path, (GOOD, BAD), ENGINE)
    text = Page(source).text
    for wanted in (
        "FAILED | 2 layers", "layer 0 dense", "layer 1 routed", "attention: 6*sqrt(..)", "took <script>",
        "weights are stored as bf16", "constants in the plan: bf16 12 MiB", "sm89, sm120", "1 warnings",
        "MATRIX_MULTIPLY", "left out layers",
        "layer 0 dense: 31 tokens at most, 9.0 if all had as many; 2 experts without one", "layer 1 routed: 3 vectors",
        "12 fp8, 1 bf16", "torch 2.13.0", "v4export bisect OUT",
        "61 in a routed layer", "v4::MoeRoute", "0123456789abcdef", "trace",
    ):  # fmt: skip
        assert wanted in text, wanted


@pytest.mark.parametrize(
    ("boundaries", "verdict", "colour"),
    [((GOOD,), "PASSED", "passed"), ((GOOD, BAD), "FAILED", "failed"), (None, "NOT VERIFIED", "")],
)
@pytest.mark.parametrize("engine", [None, ENGINE])
def test_verdict_colour_and_missing_parts(tmp_path, boundaries, verdict, colour, engine):
    report, source = written(tmp_path, boundaries, engine)
    (heading,) = (attributes for tag, attributes in Page(source).tags if tag == "h1")
    assert report["verdict"].startswith(verdict) and heading["class"] == colour
    assert (f"h1.{colour} {{" in source) or not colour
    assert ("<h2>Engines</h2>" in source) == bool(engine) == bool(report["engines"])
    assert ("<svg" in source) == (boundaries is not None) == (report["verification"] is not None)
    rows = [attributes for tag, attributes in Page(source).tags if tag == "tr" and attributes.get("class") == "bad"]
    assert len(rows) == (2 if boundaries and BAD in boundaries else 0)
    assert not re.search(r'(cy|cx|y1|y2)="(nan|inf)"', source)


def test_line():
    start, end = (
        "[✓] layer 0 dense          max|Δ| 1.0e-03  rel 4.0e-04",
        "  (limit 1.0e-02, bf16)  carried 1.0e-03  2/4 experts",
    )
    assert line(GOOD, "bf16") == f"{start}  cos 0.999980{end}"
    failed = line(BAD, "fp8").splitlines()
    assert failed[0].startswith("[✗] layer 1 routed") and "3 near-ties" in failed[0]
    assert failed[1] == f"      took {HOSTILE}"
    tied = line(TIED, "bf16")
    assert tied.startswith("[~] layer 2 csa") and tied.endswith("  7/9 tokens selected among more  2 near-ties")
