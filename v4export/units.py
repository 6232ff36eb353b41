"""What is finished of a build, so that one that was stopped goes on from there.

A unit takes time to make and depends on what can be named: a shard of weights, the graphs, a verdict, an engine. Its
files are written elsewhere, brought to the disk and renamed into place. Only then is it written down in a journal, an
object of JSON a line, with a hash of all that it depends on and of each of its files. A build that goes on sets aside
what there is, and takes back the units that it would make from the same things and whose files have their hashes; so
nothing else can get into its result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from v4export.plain import from_plain, to_json
from v4export.progress import Stages, StageTime
from v4export.side_files import is_inside

JOURNAL = "journal"
#: Beside the journal: files of units that a build before this one finished, and the beginnings of names of folders in
#: which units are being made.
_BEFORE, _UNFINISHED = "before", "unfinished."

T = TypeVar("T")


class At:
    """Where a unit's files are to be written: called with a file's name in the result.

    Args:
        folder: in which the unit is made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, str | None] = {}

    def __call__(self, file: str) -> Path:
        """The path, whose folder there is."""
        self._known.setdefault(file, None)
        return _with_folder(self._folder / file)

    def hashed(self, file: str, sha256: str) -> None:
        """The hash of a file as it was written, which saves reading it again."""
        self._known[file] = sha256

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Of every file, what the journal says of it."""
        return {file: _facts(self._folder / file, sha256) for file, sha256 in self._known.items()}


@dataclass(frozen=True)
class _Record:
    """A line of the journal.

    Attributes:
        name: of the unit.
        key: hash of its name and of all that it depends on.
        files: bytes and sha256 of each, by its name in the result.
        value: what making it came to.
        of: keys of the units that were made or taken on the way, which it needs, by name.
        stages: what stages cost that were run on the way.
    """

    name: str
    key: str
    files: dict[str, dict[str, Any]]
    value: Any = None
    of: dict[str, str] = field(default_factory=dict)
    stages: tuple[StageTime, ...] = ()


class Units:
    """The units of one build.

    Args:
        folder: the result, of which everything is set aside that an earlier build left.
        home: where the journal is kept; None keeps nothing.
        common: what every unit depends on, such as versions.
        stages: get the costs of stages that need not be run again.
    """

    def __init__(
        self, folder: Path, home: Path | None = None, *, common: Any = None, stages: Stages | None = None
    ) -> None:
        self._folder, self._home, self._common = folder, home, common
        self._stages = stages or Stages(quiet=True)
        self._before: dict[str, _Record] = {}
        self._here: dict[str, _Record] = {}
        self._needed: list[dict[str, str]] = []
        if home:
            self._before = _read(home / JOURNAL)
            self._set_aside(home)

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of every file of the units that are made or taken, by name."""
        return {name: facts["sha256"] for record in self._here.values() for name, facts in record.files.items()}

    def find(self, name: str, depends: Any, kind: type[T]) -> T | None:
        """What a unit came to, taken from an earlier build; None where it has to be made.

        Args:
            name: of the unit.
            depends: all that its files and its value follow from, beside ``common``.
            kind: of the value.
        """
        record = self._take(name, self._key(name, depends))
        if record is None:
            return None
        try:
            found: T = from_plain(kind, record.value)
        except (TypeError, ValueError, KeyError, AttributeError):
            return None  # what JSON has no form for
        self._note(record)
        self._stages.again(record.stages)
        return found

    def make(
        self, name: str, depends: Any, making: Callable[[At], T], worth: Callable[[T], bool] = lambda _: True
    ) -> T:
        """Make a unit; arguments as for ``find``.

        Args:
            name: of the unit.
            depends: all that it follows from.
            making: writes its files where it is told to.
            worth: whether what came of it can be taken by a later build.
        """
        if self._home is None:
            return making(At(self._folder))
        stages = len(self._stages.done)
        drafts = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._home))
        self._needed.append({})
        at = At(drafts)
        try:
            value = making(at)
            facts = at.facts
            for file in facts:
                synced(drafts / file)
                _move(drafts / file, self._folder / file)
            for folder in {(self._folder / file).parent for file in facts}:
                synced(folder)
        finally:
            needed = self._needed.pop()
            shutil.rmtree(drafts, ignore_errors=True)
        done = tuple(self._stages.done[stages:])
        record = _Record(name, self._key(name, depends), facts, value, needed, done)
        self._note(record)
        if worth(value):
            self._write(record)
        return value

    def once(self, name: str, depends: Any, kind: type[T], making: Callable[[At], T]) -> T:
        """What a unit comes to, taken or made."""
        found = self.find(name, depends, kind)
        return self.make(name, depends, making) if found is None else found

    def _key(self, name: str, depends: Any) -> str:
        return hashed([name, self._common, depends])

    def _note(self, record: _Record) -> None:
        self._here[record.name] = record
        for needed in self._needed[-1:]:
            needed[record.name] = record.key

    def _take(self, name: str, key: str) -> _Record | None:
        """The record of a unit whose files are in place, or can be put there; so are those of units it is made of."""
        here = self._here.get(name)
        if here and here.key == key:
            return here
        record = self._before.get(name)
        if self._home is None or record is None or record.key != key:
            return None
        aside = self._home / _BEFORE
        if not all(self._take(*needed) for needed in record.of.items()):
            return None
        if any(not (aside / f).is_file() or _facts(aside / f) != facts for f, facts in record.files.items()):
            return None
        for file in record.files:
            _move(aside / file, self._folder / file)
        self._here[name] = record
        return record

    def _set_aside(self, home: Path) -> None:
        """Move files of finished units out of the result, and remove everything else from it."""
        for unfinished in home.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished)
        for record in self._before.values():
            for file in filter(lambda file: (self._folder / file).is_file(), record.files):
                _move(self._folder / file, home / _BEFORE / file)
        for entry in self._folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _write(self, record: _Record) -> None:
        """Append to the journal; a line that an earlier build did not finish is ended first."""
        assert self._home is not None
        with open(self._home / JOURNAL, "ab") as journal:
            # One line: to_json's is indented.
            line = json.dumps(json.loads(to_json(record))).encode() + b"\n"
            journal.write(line if _ends_a_line(self._home / JOURNAL) else b"\n" + line)
            journal.flush()
            os.fsync(journal.fileno())
        synced(self._home)


def hashed(value: Any) -> str:
    """sha256 of a value as JSON."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def content(file: Path, offset: int, nbytes: int) -> str:
    """sha256 of a stretch of a file."""
    digest, buffer = hashlib.sha256(), bytearray(min(nbytes, 4 << 20))
    with open(file, "rb", buffering=0) as stream, memoryview(buffer) as view:
        stream.seek(offset)
        while nbytes and (got := stream.readinto(view[:nbytes])):
            digest.update(view[:got])
            nbytes -= got
    if nbytes:
        raise OSError(f"{file} is {nbytes} bytes too short")
    return digest.hexdigest()


def synced(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(journal: Path) -> dict[str, _Record]:
    """The newest record of each unit; a line that is damaged, as the last one may be, is left out."""
    found: dict[str, _Record] = {}
    for line in journal.read_bytes().splitlines() if journal.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            record = from_plain(_Record, json.loads(line))
            if all(is_inside(file) for file in record.files):
                found[record.name] = record
    return found


def _ends_a_line(file: Path) -> bool:
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        return stream.read() in (b"", b"\n")


def _facts(file: Path, sha256: str | None = None) -> dict[str, Any]:
    """What the journal says of a file; it is read unless its hash is known."""
    with open(file, "rb") as stream:
        sha256 = sha256 or hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": sha256}


def _with_folder(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _move(file: Path, to: Path) -> None:
    os.replace(file, _with_folder(to))
