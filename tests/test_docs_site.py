"""The documents as a site: links, the operator reference, and flags that are said to be there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from v4export.cli import cli
from v4export.plugins import OPS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_links_and_anchors(tmp_path):
    """A page that is in no menu, a link that leads nowhere and an unknown heading are all errors."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "operators.html").stat().st_size > 10_000


def test_links_of_the_readme():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


def test_the_operator_reference_is_what_operators_say():
    spec = importlib.util.spec_from_file_location("operators", DOCS / "operators.py")
    assert spec and spec.loader
    operators = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(operators)
    page = operators.PAGE.read_text(encoding="utf-8")
    assert page == operators.text(), "run python docs/operators.py"
    assert [op.op_type for op in OPS if op.op_type not in page and op.torch_op._name.split("::")[1] not in page] == []


def test_new_flags_of_the_migration_page_are_there():
    """Of every row, what stands in the second column."""
    table = (DOCS / "from-tensorrt-llm.md").read_text().split("<!-- flags -->")[1].split("<!-- end: flags -->")[0]
    named = {flag for row in table.splitlines()[3:] for flag in re.findall(r"`(--[\w-]+|-\w)`", row.split("|")[2])}
    known = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    assert len(named) > 10 and named - known == set()
