"""Checkpoints and exported bundles that tests of several folders share; none of them may be written to."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from traced import traced_once

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config.readers import to_hub_config
from v4export.package.bundle import Bundle

# Traces and graphs are many objects, of which few are garbage.
gc.set_threshold(100 * gc.get_threshold()[0])
# Operators on tiny tensors: a second thread costs more than it brings.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
#: Where a trained checkpoint may lie: in the repository, or beside it.
TRAINED = (ROOT / "examples" / "tiny-v3", ROOT.parent / "shared" / "checkpoints" / "tiny-v3")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_traced_twice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports trace each kind of block once for the whole test run, however many bundles and processes there are."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("v4export.graphs.export.traced", traced_once(shared))
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of preset tiny-v3, bfloat16."""
    return synth(presets.load("tiny-v3"), tmp_path_factory.mktemp("hub") / "tiny-v3")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """From a precision, the bundle of the tiny checkpoint; each is exported once (seconds)."""
    made: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            out = tmp_path_factory.mktemp("bundles") / precision
            made[precision] = api.export(tiny_checkpoint, out, precision=precision, max_seq_len=1024).bundle
        return made[precision]

    return bundle


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint where there is one, else a random one saved by transformers."""
    for folder in TRAINED:
        if (folder / "model.safetensors").is_file():
            return folder
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in to_hub_config(presets.load("tiny-v3")).items() if key != "model_type"}
    folder = tmp_path_factory.mktemp("random") / "tiny-v3"
    transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**raw)).save_pretrained(folder)
    return folder
