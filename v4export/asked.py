"""What is asked of a build, as a bundle's manifest records it, so that the build can be repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4export.config.sharding import Sharding
from v4export.engine.options import EngineOptions
from v4export.errors import BadInput
from v4export.plain import from_plain


@dataclass(frozen=True)
class Source:
    """A file that a build reads beside its checkpoint."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: str | Path | None) -> Source | None:
        """That of a path as it is now.

        Raises:
            BadInput: it cannot be read.
        """
        if path is None:
            return None
        try:
            with open(path, "rb") as file:
                return cls(Path(path).resolve(), hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise BadInput(f"cannot read {path}", str(error)) from error

    def again(self) -> Path:
        """Its path, where the file is still the same.

        Raises:
            BadInput: it is gone, or another.
        """
        if Source.of(self.path) != self:
            raise BadInput(f"{self.path} has changed since the build that is to be repeated", fix="put it back")
        return self.path


@dataclass(frozen=True)
class Asked:
    """Arguments of ``building.build``, by its names; files with their hashes."""

    precision: str
    keep: tuple[str, ...]
    max_seq_len: int
    layers: int | None
    copy_weights: bool
    cpu_weights: bool
    engram_inside: bool
    think_steps: int | None
    draft: bool
    state: str
    calibrate: Source | None
    sharding: Sharding
    expert_load: Source | None
    scan_values: bool
    verify: bool
    engine: EngineOptions | None
    device: str

    @classmethod
    def read(cls, manifest: Mapping[str, Any], where: Path) -> Asked:
        """What a manifest has recorded.

        Raises:
            BadInput: nothing, or something else.
        """
        try:
            asked: Asked = from_plain(cls, manifest["asked"])
            return asked
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadInput(
                f"{where} does not say how to repeat its build", f"asked: {error!r}", "build it with a command of yours"
            ) from error

    def arguments(self) -> dict[str, Any]:
        """Those of ``building.build``.

        Raises:
            BadInput: a file has changed.
        """
        files = {"calibrate": self.calibrate, "expert_load": self.expert_load}
        return {
            **vars(self),
            "layers": None if self.layers is None else range(self.layers),
            **{name: source and source.again() for name, source in files.items()},
        }
