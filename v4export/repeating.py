"""A build repeated from what its manifest recorded, and how far the result is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4export.asked import Asked
from v4export.building import Built, build
from v4export.checkpoint.identity import check_same
from v4export.errors import BuildsDiffer
from v4export.opened import open_checkpoint
from v4export.package.bundle import MANIFEST, Bundle


@dataclass(frozen=True)
class Repeated:
    """A build and its repetition.

    Attributes:
        built: the repetition.
        same: files that are byte-identical to those of the first build, by its manifest.
        varying: files that the manifest names as such that cannot be.
        differing: files that should be identical, and are not.
        versions: packages whose version is another now: name -> (then, now).
    """

    built: Built
    same: tuple[str, ...]
    varying: tuple[str, ...]
    differing: tuple[str, ...]
    versions: dict[str, tuple[str | None, str | None]]

    def check(self) -> None:
        """Raise BuildsDiffer where a file differs that should not."""
        if self.differing:
            moved = ", ".join(f"{name} {then} is {now}" for name, (then, now) in self.versions.items())
            raise BuildsDiffer(
                f"{self.built.bundle.folder} is not what the first build left",
                f"{len(self.differing)} files differ: {', '.join(self.differing[:5])}",
                f"install the versions of the first build: {moved}" if moved else "the checkpoint's values are others",
            )


def repeat(first: Bundle, out: str | Path | None = None, *, model: str | Path | None = None, **how: Any) -> Repeated:
    """Build a bundle once more, from the same checkpoint and options; of the first, only the manifest is read.

    Args:
        first: the bundle.
        out: the bundle to make; ``FOLDER.again`` beside the first unless given.
        model: where the checkpoint is now, if it has moved.
        how: arguments of ``building.build`` that its result does not follow from: ``force``, ``stages``, ...

    Raises:
        BadInput: the manifest does not say how, or the checkpoint or another file is not the same.
    """
    asked = Asked.read(first.manifest, first.folder)
    source, folder = model or first.source, first.folder.resolve()
    check_same(open_checkpoint(source), first.manifest["checkpoint"], first.folder)
    built = build(source, out or folder.with_name(f"{folder.name}.again"), **asked.arguments(), **how)
    return Repeated(built, *_compared(first.manifest, built.bundle.manifest))


def _compared(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Any, ...]:
    names = sorted({*then["files"], *now["files"]})
    varying = {*then.get("varies", ()), *now["varies"]}
    found: dict[bool, list[str]] = {True: [], False: []}
    for name in (name for name in names if name not in varying):
        found[then["files"].get(name) == now["files"].get(name)].append(name)
    before, after = then.get("versions") or {}, now["versions"]
    moved = {name: (before.get(name), after.get(name)) for name in sorted({*before, *after})}
    return (
        tuple(found[True]),
        tuple(name for name in (MANIFEST, *names) if name in varying),
        tuple(found[False]),
        {name: pair for name, pair in moved.items() if pair[0] != pair[1]},
    )
