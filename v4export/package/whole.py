"""A folder that appears whole or not at all, made in one beside it that a build which was stopped leaves to the next.

``.OUT.partial`` holds the result, in ``result``; whatever is needed to go on with it; and a lock, which the system lets
go of however a build ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from v4export.errors import FULL, BadInput, NotEnough, NumbersDiffer
from v4export.package.bundle import MANIFEST
from v4export.units import JOURNAL, synced

LOCK, RESULT = "lock", "result"
#: What file systems say that have no locks; builds there are not kept apart.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def whole_folder(
    out: Path, force: bool, resume: bool | None = None, say: Callable[[str], None] = lambda _: None
) -> Iterator[Path]:
    """A folder to build in, renamed to ``out`` on success and removed on failure.

    What fails its verification is kept, as ``OUT.failed``. What can be gone on with is kept where it is when the build
    is stopped, or disk, memory or time do not suffice, or an earlier build has made some of it; a note of the error
    says so; of an error that comes once ``out`` is in its place, that it is complete.

    Args:
        out: must not exist, unless ``force``.
        force: replace an ``out`` that is itself a bundle, once the new one is complete.
        resume: keep what an earlier build has left; False discards it; None is for what cannot be gone on with.
        say: told what is done about an earlier build.

    Raises:
        BadInput: ``out`` exists, cannot be written beside, or another build makes it.
        NotEnough: the disk is full.
    """
    _check(out, force)
    home = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(home)
    except OSError as error:
        raise _full(out, error) or BadInput(f"cannot write to {out.parent}", str(error), "choose another -o") from error
    kept = inherited = False
    folder = None
    try:
        _check(out, force)  # another build may just have made it
        inherited = bool(resume and _rest(home))
        folder = _begun(home, out, resume, say)
        yield folder
        _sync(folder)
        _replace(folder, out)
    except NumbersDiffer as error:
        assert folder is not None
        # What is wrong can only be found out by looking at it.
        failed = out.with_name(f"{out.name}.failed")
        if not failed.exists() or (failed / MANIFEST).is_file():
            _replace(folder, failed)
            error.args = (f"{error}\n  it is kept, with its report, as {failed}",)
        raise
    except BaseException as error:
        if folder and not folder.exists():
            error.add_note(f"{out} is complete")
            raise
        full = _full(out, error)
        # What an earlier build has finished is not lost by a wrong option of a later one.
        stopped = resume is not None and (full is not None or _is_stopped(error))
        kept = inherited or (stopped and (home / JOURNAL).is_file())
        if kept:
            (full or error).add_note(f"what is finished is kept: go on with --resume, or start anew without ({home})")
        if full:
            raise full from error
        raise
    finally:
        if not kept:
            _remove(home)
        os.close(lock)


def _check(out: Path, force: bool) -> None:
    if out.exists() and not (force and (out / MANIFEST).is_file()):
        raise BadInput(
            f"{out} exists",
            "it is not a bundle, and is never replaced" if force else "",
            "choose another -o, or replace a bundle with --force",
        )


def _full(out: Path, error: BaseException) -> NotEnough | None:
    """The error of a full disk, if that is what went wrong."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return None
    left = f"{shutil.disk_usage(out.parent).free >> 20} MiB left ({error.strerror})"
    return NotEnough(f"the disk of {out.parent} is full", left, "free some, or choose another -o")


def _is_stopped(error: BaseException) -> bool:
    """Whether a build would have gone on but for the user or the machine."""
    return isinstance(error, NotEnough | MemoryError) or not isinstance(error, Exception)


def _locked(home: Path) -> int:
    """The descriptor of the lock of a folder, which is made.

    Raises:
        BadInput: another build has it, or the folder is something else.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            home.mkdir()
        if home.is_symlink() or not home.is_dir() or not ((home / LOCK).is_file() or not any(home.iterdir())):
            raise BadInput(f"{home} is in the way", "no build has left it", "move it, or choose another -o")
        try:
            lock = os.open(home / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # removed by the build that had it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise BadInput(
                f"another build makes {home.name[1:].removesuffix('.partial')}",
                f"process {process} has {home / LOCK}",
                "wait for it, stop it, or choose another -o",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(home / LOCK)):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
                return lock
        os.close(lock)


def _begun(home: Path, out: Path, resume: bool | None, say: Callable[[str], None]) -> Path:
    """The result's folder, with what an earlier build left if that is to be gone on with."""
    left = _rest(home)
    if left and not resume:
        say(f"discarding what a build that was stopped has left in {home}")
        for entry in left:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    elif resume:
        say(f"going on with {home}" if left else f"nothing to resume for {out}: building it from the start")
    folder = home / RESULT
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return folder


def _rest(home: Path) -> list[Path]:
    return [entry for entry in home.iterdir() if entry.name != LOCK]


def _remove(home: Path) -> None:
    """The lock is the last to go, so that no other build can begin here before."""
    with contextlib.suppress(OSError):
        for entry in _rest(home):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
        (home / LOCK).unlink()
        home.rmdir()


def _sync(folder: Path) -> None:
    """A folder that is renamed before its files are on the disk would have empty ones after a power cut."""
    for path in (*folder.rglob("*"), folder):
        synced(path)


def _replace(new: Path, old: Path) -> None:
    """Put ``new`` in ``old``'s place; an old one is removed only once the new one stands there."""
    if not old.exists():
        os.replace(new, old)
        synced(old.parent)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".former", dir=old.parent))
    os.replace(old, former)
    os.replace(new, old)
    synced(old.parent)
    shutil.rmtree(former)
