"""Commands in processes of their own that are killed, or whose disk is full, at a chosen moment."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from traced import traced_once

#: Forks of a process that has imported everything and started no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["v4export.api", "v4export.cli", "onnxruntime", "torch._dynamo", "torch.onnx", "traced", "stopping"]
)

#: Bytes of a file of converted tensors, so that a tiny model has several.
SHARD_BYTES = 40_000


@dataclass(frozen=True)
class Stop:
    """What is to happen, and at which event: before a file is renamed, linked or brought to the disk, and in the
    middle of every write; of ``unreadable``, before a file is opened to be read.
    """

    kind: str  # kill, full, count, or one of FAULTS
    number: int = 0


def _raise(error: BaseException) -> None:
    raise error


#: What happens once, at the event.
FAULTS: dict[str, Callable[[str], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "memory": lambda _: _raise(MemoryError()),
    "unreadable": lambda file: _raise(OSError(errno.EIO, os.strerror(errno.EIO), file)),
    "clock": lambda _: _jump(-400 * 24 * 3600.0),
}

#: By which processes are known that a child has started.
_MARK = "V4EXPORT_STARTED_IN"


def _jump(seconds: float) -> None:
    """Set the clock that ``time.time`` reads."""
    now = time.time
    time.time = lambda: now() + seconds  # type: ignore[assignment]


def orphans(folder: Path) -> list[psutil.Process]:
    """Processes that children of a folder have started, and that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Child:
    """``v4export ARGUMENTS``; paths are relative to ``folder``, which also gets its output."""

    def __init__(self, folder: Path, traces: Path, arguments: list[Any], stop: Stop) -> None:
        self.folder = folder
        for name in ("said", "events"):
            (folder / name).unlink(missing_ok=True)
        (folder / "said").touch()
        self.process = CONTEXT.Process(target=_run, args=(folder, traces, [*map(str, arguments)], stop))
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; with ``seconds``, of a process that is killed then."""
        self.process.join(seconds)
        if seconds is not None:
            self.process.kill()
        self.process.join()
        return self.process.exitcode

    @property
    def said(self) -> str:
        """stdout and stderr."""
        return (self.folder / "said").read_text()

    @property
    def events(self) -> int:
        """How many there were in a run that has ended by itself."""
        return int((self.folder / "events").read_text())


def _run(folder: Path, traces: Path, arguments: list[str], stop: Stop) -> None:
    import torch

    from v4export import cli
    from v4export.graphs import export, shards, trace

    os.chdir(folder)
    os.environ[_MARK] = str(folder)
    said = os.open("said", os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    torch.set_num_threads(1)
    shards._SHARD_BYTES = SHARD_BYTES
    export.traced = traced_once(traces)
    trace._register_schemas()  # as tracing does, which ONNX's inference of shapes goes by
    events = _Events(folder, stop)
    events.install()
    sys.argv = ["v4export", *arguments]
    try:
        cli.main()
    finally:
        with _OPEN(folder / "events", "w") as file:
            file.write(str(events.done))


class _Events:
    """Counts events, and acts at the one that is asked for; a full disk stays full."""

    def __init__(self, folder: Path, stop: Stop) -> None:
        self.folder, self.stop, self.done = folder, stop, 0

    def install(self) -> None:
        for name in ("replace", "link", "fsync") * (self.stop.kind not in ("full", "unreadable", "short")):
            setattr(os, name, self._before(getattr(os, name)))
        builtins.open = io.open = self._open  # type: ignore[assignment]

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.event()
            return call(*arguments, **options)

        return counted

    def event(self, file: str = "") -> None:
        self.done += 1
        if self.stop.kind in FAULTS and self.done == self.stop.number:
            FAULTS[self.stop.kind](file)
        if self.stop.kind == "full" and self.done >= self.stop.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        plain = mode.replace("t", "").replace("b", "")
        inside = isinstance(file, str | os.PathLike) and Path(file).absolute().is_relative_to(self.folder)
        if inside and plain == "r" and self.stop.kind == "unreadable" and os.path.exists(file):
            self.event(str(file))
        if plain not in ("w", "a") or not inside or self.stop.kind == "unreadable":
            return _OPEN(file, mode, buffering, *rest, **options)
        raw = _Half(file, plain)
        raw.event, raw.short = self.event, self.stop.kind == "short"
        if not buffering:
            return raw
        stream = io.BufferedWriter(raw)
        return stream if "b" in mode else io.TextIOWrapper(stream, *rest, **options)


_OPEN = builtins.open


class _Half(io.FileIO):
    """A file whose every write is an event, between its halves."""

    event: Callable[[], None]
    short: bool  # takes half of what it is given, as the system may

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.short:
            return super().write(view[: (len(view) + 1) // 2])
        done = super().write(view[: len(view) // 2])
        self.event()
        return done + super().write(view[done:])


_COSTS = ("seconds", "peak_mib", "mib")
#: Files whose hashes follow from costs, or differ between two engines.
_UNLIKE = ("report.json", "report.html", "model.engine")
#: Costs as report.html has them.
_SHOWN = re.compile(r"(?<=class=\"n\">)[\d.]+( MiB)?(?=</td>)|in [\d.]+ s, peak \d+ MiB")


def content(folder: Path) -> dict[str, Any]:
    """Every file of a bundle, without what stages cost; of an engine its size, as TensorRT's differ in some bytes."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        data = file.read_bytes()
        found[name] = (
            _without(json.loads(data)) if file.suffix == ".json"
            else _SHOWN.sub("", data.decode()) if file.suffix == ".html"
            else len(data) if file.suffix == ".engine"
            else data
        )  # fmt: skip
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        left = {k: v for k, v in value.items() if k not in _COSTS and not (k == "sha256" and "backend" in value)}
        return {k: None if k in _UNLIKE else _without(v) for k, v in left.items()}
    return [_without(item) for item in value] if isinstance(value, list) else value
