"""Writes the C++ package of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from v4export.cpp.describe import describe
from v4export.package.bundle import Bundle
from v4export.package.whole import whole_folder
from v4export.runtime.tokenizer import load_tokenizer


@dataclass(frozen=True)
class CppPackage:
    """What was written.

    Attributes:
        folder: the CMake project.
        bundle: that it runs.
        files: of the project, relative to it.
        thoughts: whether the model has some, which the runner leaves out.
    """

    folder: Path
    bundle: Path
    files: tuple[str, ...]
    thoughts: bool


def package(bundle: Bundle, out: Path, refused_ids: Mapping[int, str]) -> CppPackage:
    """Write a CMake project that runs a bundle, into a folder that appears whole or not at all.

    Args:
        bundle: stays where it is; nothing of it but its description is copied.
        out: must not exist.
        refused_ids: tokens that a prompt may not have, and why.

    Raises:
        BadInput: ``out`` exists, or the bundle is not whole.
        NotSupported: the runner cannot run the bundle.
    """
    with whole_folder(out, force=False) as folder:
        stop_ids = load_tokenizer(bundle.folder).ends(bundle.config.eos_token_ids)
        described = describe(bundle, stop_ids, refused_ids)
        write_sources(folder)
        (folder / "model").mkdir()
        for name, data in described.items():
            (folder / "model" / name).write_bytes(data)
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return CppPackage(out, bundle.folder, tuple(names), bundle.thinking is not None)


def write_sources(folder: Path) -> None:
    """Write the runner's project, which is the same for every bundle, into a folder that is there."""
    with as_file(files("v4export.cpp") / "project") as sources:
        shutil.copytree(sources, folder, dirs_exist_ok=True)
    engram = files("v4export.engram") / "engram.hpp"
    (folder / "src" / "engram.hpp").write_text(engram.read_text())
