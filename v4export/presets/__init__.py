"""Configurations by name: the published config.json of released models, and a tiny one of each family.

The tiny ones keep what is odd about their family (no query low rank, groups, YaRN, FP8 blocks, kinds of layer) at a
size that runs anywhere; their widths are not multiples of an FP8 block, as a released model's need not be.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from v4export.config import ModelConfig
from v4export.config.readers import read_config
from v4export.errors import BadInput

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def path(name: str) -> Path:
    """The config.json file of a preset. Raises BadInput for a name that is none."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        fix = f"Did you mean {' or '.join(close)}?" if close else ""
        raise BadInput(f"no preset is called {name!r}", f"presets: {', '.join(known)}", fix)
    return _FOLDER / f"{name}.json"


def load(name: str) -> ModelConfig:
    """The ModelConfig of a preset. Raises BadInput for a name that is none."""
    return read_config(path(name))
