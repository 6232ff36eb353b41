"""Compiled kernels kept between runs, by a name that says everything they were made from."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def folder() -> Path:
    """Where they are kept: V4EXPORT_CACHE, or the user's cache."""
    base = (
        os.environ.get("V4EXPORT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "v4export"
    )
    return Path(base) / "kernels"


def stored(name: str, make: Callable[[Path], object]) -> Path:
    """The file of that name, made if there is none. Of several makers at once, one is kept."""
    path = folder() / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
        os.close(handle)
        try:
            make(Path(partial))
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    return path
