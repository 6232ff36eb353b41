"""A bundle's files are compared with its manifest before it is used, and no path in it leads out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from v4export.errors import BadInput
from v4export.package.bundle import MANIFEST, Bundle


@pytest.fixture
def folder(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle("bf16").folder, tmp_path / "bundle"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


USES = {
    "run": ["run", "BUNDLE", "--prompt", "a", "-n", "1"],
    "bench": ["bench", "BUNDLE", "-p", "1", "-n", "1", "-r", "1"],
    "package": ["package", "BUNDLE", "--triton", "OUT"],
    "package --cpp": ["package", "BUNDLE", "--cpp", "OUT"],
    "verify": ["verify", "BUNDLE"],
    "engine": ["engine", "BUNDLE"],
}


@pytest.mark.parametrize("verb", USES)
def test_bundle_that_has_changed(capfd, folder, tmp_path, verb):
    flip(folder / "tokenizer.json")
    named = {"BUNDLE": folder, "OUT": tmp_path / "out"}
    found = call(capfd, *(named.get(word, word) for word in USES[verb]))
    assert found.code == 2 and "has changed since it was built" in found.err and "tokenizer.json" in found.err
    assert not (tmp_path / "out").exists()


def test_check_can_be_forgone(capfd, folder):
    with (folder / "report.html").open("w") as file:
        file.write("another")
    facts = json.loads((folder / MANIFEST).read_text())
    facts["files"]["report.html"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(facts))
    assert call(capfd, *("run", folder, "--prompt", "a", "-n", "1")).code == 2
    assert call(capfd, *("run", folder, "--prompt", "a", "-n", "1", "--no-check")).code == 0


def test_engine_that_has_changed_can_be_built_anew(folder):
    facts = json.loads((folder / MANIFEST).read_text())
    facts["files"]["model.engine"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(BadInput, match=r"model\.engine"):
        Bundle.open(folder).check_files()
    Bundle.open(folder).check_files(but=".engine")


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update(values)


WRONG = {
    "file above": lambda facts: facts["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}),
    "absolute file": lambda facts: facts["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    "no hash": lambda facts: facts["files"].update({"model.onnx": {"bytes": 1}}),
    "engine above": change(engines={"model.onnx": {"path": "../m", "sha256": "0" * 64, "bytes": 1}}),
    "keep is a word": change(keep="fp32:*"),
    "files is a list": change(files=[]),
    "thinking is a number": change(thinking=3),
    "no ranks": change(sharing={"sharding": {"tp": 0, "ep": 1, "pp": 1}}),
    "a length that is none": change(max_seq_len=True),
}


@pytest.mark.parametrize("name", WRONG)
def test_manifest_with_something_else(folder, name):
    facts = json.loads((folder / MANIFEST).read_text())
    WRONG[name](facts)
    (folder / MANIFEST).write_text(json.dumps(facts))
    with pytest.raises(BadInput, match="is not whole"):
        Bundle.open(folder)


def test_file_that_is_a_link_elsewhere(folder, tmp_path):
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    os.symlink(tmp_path / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(BadInput, match="leads out of its directory"):
        Bundle.open(folder).check_files()


def test_config_that_is_a_link_elsewhere(tiny_checkpoint, capfd, tmp_path):
    hub = Path(shutil.copytree(tiny_checkpoint, tmp_path / "hub"))
    shutil.move(hub / "config.json", tmp_path / "config.json")
    os.symlink(tmp_path / "config.json", hub / "config.json")
    found = call(capfd, "inspect", hub)
    assert found.code == 2 and "leads out of its directory" in found.err
