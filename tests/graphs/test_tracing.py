"""Parts traced by two processes, beside the same traced by one."""

from __future__ import annotations

import sys

import pytest

from v4export import presets
from v4export.graphs import tracing
from v4export.graphs.trace import trace_parts
from v4export.graphs.tracing import stored, traced
from v4export.precision import precision

CONFIG = presets.load("tiny-v4")
RECIPE = precision("mxfp4", CONFIG)


@pytest.fixture(scope="module")
def alone():
    return trace_parts(CONFIG, RECIPE)


def assert_same(found, alone):
    assert list(found) == list(alone)
    for name, part in found.items():
        assert stored(part) == stored(alone[name]), name


@pytest.mark.slow
def test_two_processes_find_what_one_does(alone, monkeypatch):
    """Wherever a part was traced, and whatever was before it; so that a bundle's bytes depend on no race."""
    own = []

    def counted(*args, **options):
        found = trace_parts(*args, **options)
        own.append(len(found))
        return found

    monkeypatch.setattr(tracing, "_WORTH", 1)
    monkeypatch.setattr(tracing, "_cores", lambda: 2)
    monkeypatch.setattr(tracing, "trace_parts", counted)
    # Whoever comes first: all parts but one are left to the helper.
    first, *_ = alone
    monkeypatch.setattr(tracing, "_Claims", lambda folder: lambda name: name == first)
    assert_same(traced(CONFIG, RECIPE), alone)
    assert own == [1, 0]  # the first part, and none that was missing


@pytest.mark.slow
def test_a_helper_that_fails_is_not_missed(alone, monkeypatch):
    monkeypatch.setattr(tracing, "_WORTH", 1)
    monkeypatch.setattr(tracing, "_cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert_same(traced(CONFIG, RECIPE), alone)
