"""Bundles that this folder's tests share, exported once a precision; none of them may be written to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from traced import export_bundle

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.package.bundle import Bundle


@pytest.fixture(scope="session")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """From a precision, the bundle of the trained example."""
    folder = tmp_path_factory.mktemp("trained")
    return functools.cache(lambda precision: export_bundle(trained_checkpoint, folder / precision, precision))


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a preset, a checkpoint with random weights; experts' gates are cut off where that shows."""
    folder = tmp_path_factory.mktemp("random")

    def make(preset: str) -> Path:
        config = presets.load(preset)
        limit = None if config.swiglu_limit is None else 1.0
        return synth(dataclasses.replace(config, swiglu_limit=limit), folder / preset)

    return functools.cache(make)


@pytest.fixture(scope="session")
def random_bundle(
    random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """From a preset and a precision, the bundle of a random checkpoint."""
    folder = tmp_path_factory.mktemp("random_bundles")

    def export(preset: str, precision: str) -> Bundle:
        return export_bundle(random_checkpoint(preset), folder / f"{preset}-{precision}", precision)

    return functools.cache(export)
