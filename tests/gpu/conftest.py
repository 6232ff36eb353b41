"""Models that tests on a GPU run."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4export import api

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(params=["tiny-v3", "tiny-v4x", "tiny-v3.2", "tiny-v4-fp4", "tiny-v4.1"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of each way of attending, and one that thinks."""
    trained = EXAMPLES / request.param
    return trained if trained.exists() else api.synth(request.param, tmp_path / "hub")
