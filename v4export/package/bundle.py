"""A bundle: the folder a build leaves behind, and its manifest, which says what is in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from v4export.config import ModelConfig
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.config.readers import read_config
from v4export.config.sharding import Sharding
from v4export.errors import BadInput
from v4export.package.manifest import check_form
from v4export.plain import to_json
from v4export.precision import Precision, precision
from v4export.side_files import file_of, json_object, read

MANIFEST = "v4export.json"
_FORMAT = 1
#: What ``write_manifest`` adds to the facts.
WRITTEN = ("format", "versions", "files", "varies")
#: What two builds of the same cannot have in common, by how a file's name ends.
_VARIES = {
    "report.json": "seconds and memory of the stages",
    "report.html": "seconds and memory of the stages",
    ".engine": "TensorRT's engines of one graph differ in some bytes",
}
_OWN = "seconds and memory of the stages, the command, and hashes of the files that vary"
_PACKAGES = (
    "v4export",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx",
    "tensorrt",
    "numpy",
    "ml_dtypes",
)


@dataclass(frozen=True)
class Bundle:
    """A finished build.

    Attributes:
        folder: where it lies.
        manifest: what ``v4export.json`` says.
        config: the model, as it was chosen.
        precision: of the graph.
        chosen: what was changed of the checkpoint's model.
        sharding: how it is shared among ranks; None where one graph has it all.
    """

    folder: Path
    manifest: Mapping[str, Any]
    config: ModelConfig
    precision: Precision
    chosen: Chosen = UNCHANGED
    sharding: Sharding | None = None

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read a bundle.

        Raises:
            BadInput: the folder is not one.
        """
        try:
            return Bundle.parse(folder, read(folder / MANIFEST))
        except OSError as error:
            raise _none(folder, error) from error

    @staticmethod
    def parse(folder: Path, data: bytes) -> Bundle:
        """The same of the bytes of a manifest."""
        try:
            manifest = json_object(data)
            found = manifest["format"]
        except (ValueError, KeyError) as error:
            raise _none(folder, error) from error
        if found != _FORMAT:
            raise BadInput(
                f"{folder} was made by another version", f"format {found}, this reads {_FORMAT}", "build it again"
            )
        try:
            check_form(manifest)
            chosen = Chosen.read(manifest["chosen"])
            config = chosen.of(read_config(manifest["config"]))
            recipe = precision(manifest["precision"], config, manifest["keep"])
            sharing = manifest.get("sharing")
            shared = Sharding(**sharing["sharding"]) if sharing else None
            if shared:
                shared.check(config)
            return Bundle(folder, manifest, config, recipe, chosen, shared)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{folder / MANIFEST} is not whole", f"{error!r}", "build the bundle again") from error

    def checked(self, check: bool = True) -> Bundle:
        """Itself, once its files are checked; hashing a bundle takes as long as reading it, so users may forgo it."""
        if check:
            self.check_files()
        return self

    def check_files(self, but: str | None = None) -> None:
        """Compare the files with the manifest's hashes; shards shared with the checkpoint by their size.

        Args:
            but: how names of files end that need not be whole, as they will be replaced.

        Raises:
            BadInput: names the files that are missing, have changed, or lead out of the folder.
        """
        files = {n: facts for n, facts in self.manifest["files"].items() if but is None or not n.endswith(but)}
        # Hashing lets go of Python's lock, and a disk answers several faster than one.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            whole = threads.map(self._is_whole, files, files.values())
            bad = [name for name, is_whole in zip(files, whole, strict=True) if not is_whole]
        if bad:
            raise BadInput(f"{self.folder} has changed since it was built", ", ".join(bad[:5]), "build it again")

    def _is_whole(self, name: str, facts: Mapping[str, Any]) -> bool:
        file = file_of(self.folder, name)
        if file is None or file.stat().st_size != facts["bytes"]:
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


def _none(folder: Path, error: Exception) -> BadInput:
    return BadInput(f"{folder} is not a bundle", f"{MANIFEST}: {error}", "make one with v4export build")


def write_manifest(
    folder: Path,
    facts: Mapping[str, Any],
    linked: frozenset[str] = frozenset(),
    known: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write ``v4export.json``: ``facts``, the versions of what was used, a hash of every other file, and which files
    another build of the same need not leave alike.

    Args:
        folder: the bundle being built.
        facts: what the stages found out.
        linked: names in ``weights/`` that are shared with the checkpoint. They may be terabytes and are covered by
            the checkpoint's header hash, so only their size is recorded.
        known: sha256 of files, by name, that need not be read once more.
    """
    files = file_facts(folder, linked, known)
    varies = {name: why for name in files for end, why in _VARIES.items() if name.endswith(end)} | {MANIFEST: _OWN}
    manifest = {"format": _FORMAT, **facts, "versions": versions(), "files": files, "varies": varies}
    (folder / MANIFEST).write_text(to_json(manifest) + "\n")


def file_facts(folder: Path, linked: frozenset[str], known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a manifest says of every file of a folder, by name; arguments as for ``write_manifest``."""
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = file.relative_to(folder).as_posix()
        shared = file.parent.name == "weights" and file.name in linked
        digest = {"shared": True} if shared else {"sha256": known.get(name) or _sha256(file)}
        files[name] = {"bytes": file.stat().st_size, **digest}
    return files


def versions() -> dict[str, str]:
    """Installed versions of what a build depends on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def code_hash() -> str:
    """A hash of this package's own files, of which a version says nothing while they are being worked on."""
    digest = hashlib.sha256()
    for package in ("v4export", "v4export.graphs", "v4export.plugins"):
        found = find_spec(package)
        for folder in map(Path, found.submodule_search_locations or () if found else ()):
            for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"):
                digest.update(f"{package}/{file.relative_to(folder)} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
