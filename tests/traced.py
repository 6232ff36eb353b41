"""Exports in which each kind of block is traced once for the whole test run (``conftest.py`` sees to that)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from v4export import api
from v4export.graphs.trace import trace_parts
from v4export.package.bundle import Bundle

#: A trace depends on the configuration and the precision alone, and is only read.
traced_once = functools.cache(trace_parts)


def export_bundle(checkpoint: Path, out: Path, precision: str, **options: Any) -> Bundle:
    """``api.export`` for sequences of tests' length."""
    return api.export(checkpoint, out, precision=precision, max_seq_len=512, **options).bundle
