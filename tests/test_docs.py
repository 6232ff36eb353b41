"""Commands in the README and the documents run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from command_line import call

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.is_file()]
FENCE = re.compile(r"^```(?:sh|bash|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: Verbs that read a model, which has to be in the repository or made by a command above it.
NEEDS = {"bisect", "build", "export", "inspect", "verify", "run", "engine", "package"}


def commands(text: str) -> list[list[str]]:
    """The ``v4export`` commands of a page's shell blocks, in order."""
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
            if words[:1] == ["v4export"]:
                found.append(words[: next((i for i, w in enumerate(words) if w in "|>&&;"), len(words))])
    return found


def made_by(command: list[str]) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command[:-1]) if word in ("-o", "--out")]


def test_collection():
    text = "x\n```sh\npip install v4export\nmake test\n$ v4export build M \\\n  -o OUT  # text\n"
    text += "v4export doctor | head\n```\n"
    assert commands(text) == [["v4export", "build", "M", "-o", "OUT"], ["v4export", "doctor"]]
    assert commands("```python\nv4export doctor\n```\n") == []
    assert made_by(["v4export", "synth", "tiny-v3", "-o", "DIR"]) == ["DIR"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    made: set[str] = set()
    for command in commands(page.read_text()):
        verb, model = command[1], next((word for word in command[2:] if not word.startswith("-")), "")
        if verb in NEEDS and not (tmp_path / model).exists():
            assert model not in made, f"{command} needs what a command before it should have made"
            continue
        done = call(capfd, *command[1:])
        assert done.code == 0, f"{shlex.join(command)}\n{done.out}\n{done.err}"
        made.update(made_by(command))
