"""Checkpoints for the tests of this folder: tiny ones, synthesised once, and a way to damage a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors_files import write_safetensors

from v4export import presets
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth


class Damaged:
    """A copy of a tiny checkpoint in one file, whose tensors, by their stored names, can be changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arrays = {tensor.name: tensor.read() for tensor in Checkpoint.open(directory).tensors.values()}

    def save(self) -> Checkpoint:
        write_safetensors(self.directory / "model.safetensors", self.arrays)
        return Checkpoint.open(self.directory)

    def configure(self, **changes: object) -> None:
        file = self.directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per tiny preset; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    return {name: synth(presets.load(name), folder / name) for name in presets.names() if name.startswith("tiny-")}


@pytest.fixture
def copy(tiny, tmp_path):
    """Makes a copy of a tiny checkpoint that may be damaged."""

    def make(name: str = "tiny-v3.1") -> Damaged:
        return Damaged(Path(shutil.copytree(tiny[name], tmp_path / "copy")))

    return make


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A tiny checkpoint in several shards with an index."""
    return synth(presets.load("tiny-v3"), tmp_path / "sharded", shard_bytes=400_000)
