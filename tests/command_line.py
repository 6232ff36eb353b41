"""Calls the command line: in this process, or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from v4export import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of the result."""
        return self.out.rstrip("\n").splitlines()[-1]


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """``v4export ARGUMENTS``, through its entry point."""
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["v4export", *map(str, arguments)])
        patch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as raised:
            cli.main()
    out, err = capfd.readouterr()
    return Outcome(int(raised.value.code or 0), out, err)


def start(*arguments: object, folder: Path | None = None) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    command = [sys.executable, "-c", "from v4export.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)
