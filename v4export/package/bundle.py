"""A bundle: the folder a build leaves behind. It appears whole or not at all, and its manifest says what is in it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from v4export.config import ModelConfig
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.config.readers import read_config
from v4export.errors import BadInput, NotEnough, NumbersDiffer
from v4export.plain import to_json
from v4export.precision import Precision, precision

MANIFEST = "v4export.json"
_FORMAT = 1
_PACKAGES = ("v4export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "tensorrt-rtx", "tensorrt", "numpy")


@dataclass(frozen=True)
class Bundle:
    """A finished build.

    Attributes:
        folder: where it lies.
        manifest: what ``v4export.json`` says.
        config: the model, as it was chosen.
        precision: of the graph.
        chosen: what was changed of the checkpoint's model.
    """

    folder: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    precision: Precision
    chosen: Chosen = UNCHANGED

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read a bundle.

        Raises:
            BadInput: the folder is not one.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{folder} is not a bundle", f"{MANIFEST}: {error}", "make one with v4export build"
            ) from error
        if found != _FORMAT:
            raise BadInput(
                f"{folder} was made by another version", f"format {found}, this reads {_FORMAT}", "build it again"
            )
        try:
            chosen = Chosen.read(manifest["chosen"])
            config = chosen.of(read_config(manifest["config"]))
            return Bundle(folder, manifest, config, precision(manifest["precision"], config), chosen)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{folder / MANIFEST} is not whole", f"{error!r}", "build the bundle again") from error

    def check_files(self) -> None:
        """Compare the files with the manifest's hashes; shards shared with the checkpoint by their size.

        Raises:
            BadInput: names the files that are missing or have changed.
        """
        bad = [name for name, facts in self.manifest["files"].items() if not self._is_whole(name, facts)]
        if bad:
            raise BadInput(f"{self.folder} has changed since it was built", ", ".join(bad[:5]), "build it again")

    def _is_whole(self, name: str, facts: Mapping[str, Any]) -> bool:
        file = self.folder / name
        if not file.is_file() or file.stat().st_size != facts["bytes"]:
            return False
        return "sha256" not in facts or facts["sha256"] == _sha256(file)

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a sequence."""
        return int(self.manifest["max_seq_len"])

    @property
    def thinking(self) -> Mapping[str, Any] | None:
        """Steps of thoughts, and when ``--think auto`` pauses; None where the model does not think."""
        return self.manifest.get("thinking")

    @property
    def source(self) -> Path:
        """The checkpoint it was made from."""
        return Path(self.manifest["checkpoint"]["path"])


@contextlib.contextmanager
def whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``out`` to build in, renamed to ``out`` on success and removed on any failure.

    Only what fails its verification is kept, as ``OUT.failed``.

    Args:
        out: must not exist, unless ``force``.
        force: replace an ``out`` that is itself a bundle, once the new one is complete.

    Raises:
        BadInput: ``out`` exists, or cannot be written beside.
        NotEnough: the disk is full.
    """
    if out.exists() and not (force and (out / MANIFEST).is_file()):
        raise BadInput(
            f"{out} exists",
            "it is not a bundle, and is never replaced" if force else "",
            "choose another -o, or replace a bundle with --force",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise BadInput(f"cannot write to {out.parent}", str(error), "choose another -o") from error
    try:
        building.chmod(0o755)
        yield building
        _replace(building, out)
    except NumbersDiffer as error:
        # What is wrong can only be found out by looking at it.
        kept = out.with_name(f"{out.name}.failed")
        if not kept.exists() or (kept / MANIFEST).is_file():
            _replace(building, kept)
            error.args = (f"{error}\n  it is kept, with its report, as {kept}",)
        raise
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(out.parent).free
            raise NotEnough(
                f"the disk of {out.parent} is full", f"{free >> 20} MiB left", "free some, or choose another -o"
            ) from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _replace(new: Path, old: Path) -> None:
    """Put ``new`` in ``old``'s place; an old one is removed only once the new one stands there."""
    if not old.exists():
        os.replace(new, old)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".former", dir=old.parent))
    os.replace(old, former)
    os.replace(new, old)
    shutil.rmtree(former)


def write_manifest(folder: Path, facts: Mapping[str, Any], linked: frozenset[str] = frozenset()) -> None:
    """Write ``v4export.json``: ``facts``, the versions of what was used, and a hash of every other file.

    Args:
        folder: the bundle being built.
        facts: what the stages found out.
        linked: names in ``weights/`` that are shared with the checkpoint. They may be terabytes and are covered by
            the checkpoint's header hash, so only their size is recorded.
    """
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = file.relative_to(folder).as_posix()
        shared = file.parent.name == "weights" and file.name in linked
        files[name] = {"bytes": file.stat().st_size} | ({"shared": True} if shared else {"sha256": _sha256(file)})
    manifest = {"format": _FORMAT, **facts, "versions": versions(), "files": files}
    (folder / MANIFEST).write_text(to_json(manifest) + "\n")


def versions() -> dict[str, str]:
    """Installed versions of what a build depends on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
