"""Files as strangers may have made them: which may be opened, how much of them is read, and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from v4export.errors import BadInput, V4Error

#: Most bytes that are read of a file that is parsed whole; safetensors has the same limit for its headers.
MOST_BYTES = 100_000_000


def file_of(directory: Path, name: str) -> Path | None:
    """A file of the directory, or None. Links may not leave it, but from a snapshot of the Hub's cache to its blobs.

    Raises:
        BadInput: it is a link that does.
    """
    path = directory / name
    if not path.is_file():
        return None
    home, real = directory.resolve(), path.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(cache)):
        raise BadInput(f"{path} leads out of its directory", f"it links to {real}", "put a copy in place of the link")
    return path


def is_inside(name: Any) -> bool:
    """Whether a path that a file gives names something in the file's own folder."""
    parts = PurePosixPath(name).parts if isinstance(name, str) and "\0" not in name else ()
    return bool(parts) and parts[0] != "/" and ".." not in parts


def read(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file; nothing waits for a pipe, and no more is read than may be there.

    Raises:
        BadInput: it is no regular file, or too large.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_not_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadInput(f"{path} is not a regular file", fix="put the file itself there")
        data = file.read(most + 1)
    if len(data) > most:
        raise BadInput(f"{path} is too large to be what its name says", f"over {most} bytes", "download it again")
    return data


def _not_waiting(name: str, flags: int) -> int:
    """Opening a pipe waits for a writer, unless told not to."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def explained(what: str, fix: str) -> Iterator[None]:
    """Whatever a library raises within is BadInput: tokenizers raises bare Exception, and what is none where it meets a
    fault of its own in Rust.
    """
    try:
        yield
    except V4Error:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise BadInput(what, str(error), fix) from None


def parsed(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What ``parse`` makes of a file.

    Raises:
        BadInput: it makes nothing of it.
    """
    with explained(f"{path} is not what its name says", "download the file again"):
        return parse(read(path))


def json_value(data: bytes, **how: Any) -> Any:
    """The value that JSON in UTF-8 has, whose strings are UTF-8 as well; ``how`` goes to ``json.loads``.

    Raises:
        ValueError: it is no JSON, or nested too deeply, or a string has half a UTF-16 pair.
    """
    try:
        value = json.loads(data.decode("utf-8"), **how)
        if b"\\u" in data:  # by escapes alone can there be half a pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    value = json_value(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value
