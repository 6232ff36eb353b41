"""The report of a real build, opened in a browser without a window, and its JSON against its schema."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import browser
import jsonschema
import pytest

from v4export import api

pytestmark = pytest.mark.slow
SCHEMA = json.loads(files("v4export.verify").joinpath("report.schema.json").read_text())
ASK = """() => {
    const shown = node => node.getBoundingClientRect().height > 0;
    const folded = [...document.querySelectorAll('details')].filter(d => !d.open);
    const before = document.body.scrollHeight;
    folded.forEach(d => d.open = true);
    return {
        title: document.title, heading: getComputedStyle(document.querySelector('h1')).backgroundColor,
        first: document.body.firstElementChild.tagName, points: document.querySelectorAll('circle').length,
        bars: [...document.querySelectorAll('svg path')].filter(p => p.getBBox().height > 1).length,
        cells: document.querySelectorAll('svg rect').length, grows: document.body.scrollHeight - before,
        rows: [...document.querySelectorAll('tr')].filter(shown).length,
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    };
}"""


@pytest.fixture(scope="module")
def folder(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("report") / "out"
    api.build(trained_checkpoint, out, precision="fp8", engine=None, max_seq_len=256, command="v4export build MODEL")
    yield out


def opened(page: Path, picture: Path) -> dict[str, Any]:
    command = [sys.executable, browser.__file__, str(page), str(picture), "1100", "1400", ASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_it_is_seen_as_it_is_meant(folder: Path, tmp_path: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    boundaries = report["verification"]["boundaries"]
    seen = opened(folder / "report.html", tmp_path / "seen.png")
    assert seen["loaded"] and not seen["asked"] and not seen["said"]
    found = seen["found"]
    assert found["first"] == "H1" and found["title"] == f"v4export: {report['verdict']}"
    assert found["heading"] == "rgb(29, 111, 66)"
    assert found["points"] == sum(b["limit"] > 0 for b in boundaries) > 8
    assert found["bars"] == sum(bool(b["load"]) for b in boundaries) == 3
    assert found["cells"] > found["points"] and found["rows"] > len(boundaries)
    assert found["grows"] > 100 and found["wide"] == 0
    picture = (tmp_path / "seen.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_json_follows_its_schema(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report, SCHEMA)
    for break_it in (
        lambda r: r["verification"]["boundaries"][3].pop("rel"),
        lambda r: r["verification"]["boundaries"][3].update(verdict="FINE"),
        lambda r: r.update(verdict="all is well"),
        lambda r: r["facts"]["graphs"].pop("lint"),
    ):
        broken = json.loads(json.dumps(report))
        break_it(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)
