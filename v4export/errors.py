"""Errors a user meets. Each says what failed, the values, and what to do; its class gives the exit code."""

from __future__ import annotations

import errno


class V4Error(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what failed, one sentence.
        values: the values that made it fail.
        fix: what the user can do about it.
    """

    exit_code = 2

    def __init__(self, what: str, values: str = "", fix: str = "") -> None:
        self.what, self.values, self.fix = what, values, fix
        super().__init__("\n".join(part for part in (what, values and f"  {values}", fix and f"  {fix}") if part))


class NumbersDiffer(V4Error):
    """The executed graph and the reference disagree beyond the limit. ``summary`` is the verdict in a line."""

    exit_code = 1
    summary = ""


class BuildsDiffer(V4Error):
    """A build that was repeated left something else."""

    exit_code = 1


class BadInput(V4Error):
    """A path, option, configuration or checkpoint is not what it has to be."""

    exit_code = 2


class NotEnough(V4Error):
    """Memory, disk or time does not suffice."""

    exit_code = 3


class NotSupported(V4Error):
    """The request is well formed, and nothing here can serve it."""

    exit_code = 4


#: What the system says where a disk, or a user's share of it, is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def broken(error: OSError) -> V4Error:
    """The error for a file that the system cannot read or write, whichever it was."""
    where = error.filename if error.filename is not None else "a file"
    if error.errno in FULL:
        return NotEnough("the disk is full", f"{where}: {error.strerror}", "free some")
    return BadInput(f"{where} cannot be read or written", error.strerror or str(error), "see to the disk, or the path")


def missing_package(package: str, extra: str, purpose: str) -> NotSupported:
    """The error for an optional dependency that is not installed."""
    return NotSupported(
        f"{purpose} needs the Python package {package}, which is not installed",
        fix=f"pip install 'v4export[{extra}]'",
    )
