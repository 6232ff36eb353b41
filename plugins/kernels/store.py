"""Compiled kernels kept between runs, by a name that says everything they were made from."""

from __future__ import annotations

import atexit
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Where they are kept: V4EXPORT_CACHE, or the user's cache; a folder of this process if that cannot be written."""
    named = os.environ.get("V4EXPORT_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4export"
    try:
        (base / "kernels").mkdir(parents=True, exist_ok=True)
    except OSError:
        return _own()
    return base / "kernels" if os.access(base / "kernels", os.W_OK) else _own()


@functools.cache
def _own() -> Path:
    # Not one that has a known name: what lies there is loaded and run.
    made = tempfile.TemporaryDirectory(prefix="v4export-kernels-")
    atexit.register(made.cleanup)
    return Path(made.name)


def stored(name: str, make: Callable[[Path], object]) -> Path:
    """The file of that name, made if there is none. Of several makers at once, one is kept."""
    path = folder() / name
    if not path.exists():
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
        os.close(handle)
        try:
            make(Path(partial))
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    return path
