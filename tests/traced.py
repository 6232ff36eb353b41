"""Exports in which each kind of block is traced once for the whole test run (``conftest.py`` sees to that)."""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4export import api
from v4export.graphs.trace import Part, trace_parts
from v4export.graphs.tracing import restored, stored
from v4export.package.bundle import Bundle


def traced_once(folder: Path) -> Callable[..., dict[str, Part]]:
    """``trace_parts`` with a memory, also of what other processes of the run have traced and left in ``folder``.

    A trace depends on its arguments alone, and is only read.
    """

    @functools.cache
    def parts(*args: Any, **options: Any) -> dict[str, Part]:
        path = folder / f"{hashlib.sha256(repr((args, sorted(options.items()))).encode()).hexdigest()}.trace"
        if path.exists():
            return {name: restored(part) for name, part in pickle.loads(path.read_bytes()).items()}
        traced = trace_parts(*args, **options)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_bytes(pickle.dumps({name: stored(part) for name, part in traced.items()}))
        own.replace(path)
        return traced

    return parts


def export_bundle(checkpoint: Path, out: Path, precision: str, **options: Any) -> Bundle:
    """``api.export`` for sequences of tests' length."""
    return api.export(checkpoint, out, precision=precision, max_seq_len=512, **options).bundle
