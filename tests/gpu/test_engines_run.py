"""Engines on this machine's GPU, with their state there: tokens, CUDA graphs, and several sequences at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4export import api
from v4export.engine.backend import cuda_devices
from v4export.engine.options import EngineOptions
from v4export.package.bundle import Bundle
from v4export.runtime.drafting import Drafting
from v4export.runtime.executors import Choice
from v4export.runtime.generate import generate
from v4export.runtime.sampling import Sampler, Sampling

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda_devices(), reason="no CUDA device")]
#: Across the first capacity's 256 rows, in the prompt and while decoding.
PROMPTS = [np.random.default_rng(length).integers(3, 256, length).tolist() for length in (5, 245, 290)]


def built(model: Path, out: Path, precision: str, **chosen: Any) -> Bundle:
    options = EngineOptions(max_batch=4, max_chunk=48)
    return api.build(model, out, precision=precision, max_seq_len=512, engine=options, verify=False, **chosen).bundle


def tokens_of(executor: Any, prompts: list[list[int]], drafting: Drafting | None = None) -> list[Any]:
    how = {"max_new_tokens": 24, "sampler": Sampler(Sampling()), "chunk": 64, "drafting": drafting}
    return [event.tokens_B for event in generate(executor, prompts, **how)]


@pytest.mark.parametrize("preset", ["tiny-v3", "tiny-v4"])
def test_drafts_change_no_token(preset: str, tmp_path: Path) -> None:
    bundle = built(api.synth(preset, tmp_path / "hub", draft=True), tmp_path / "out", "fp32", draft=True)
    engine = Choice("tensorrt").open(bundle)
    for prompt in PROMPTS:
        plain, drafted = (tokens_of(engine, [prompt], drafting) for drafting in (None, Drafting(3)))
        assert plain == drafted


def test_tokens_are_those_of_a_cpu(model: Path, tmp_path: Path) -> None:
    bundle = built(model, tmp_path / "out", "fp32")
    there, here = (Choice(name).open(bundle) for name in ("tensorrt", "onnxruntime"))
    for prompts in (PROMPTS[:1], PROMPTS[1:2], PROMPTS):
        assert tokens_of(there, prompts) == tokens_of(here, prompts)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_replayed_steps_are_the_same_steps(model: Path, precision: str, tmp_path: Path) -> None:
    bundle = built(model, tmp_path / "out", precision)
    replayed, plain = (Choice("tensorrt", cuda_graphs=graphs).open(bundle) for graphs in (True, False))
    for prompts in (PROMPTS[:1], PROMPTS[1:2], PROMPTS):
        assert tokens_of(replayed, prompts) == tokens_of(plain, prompts)
    by_itself = replayed.replays.reason == "TensorRT-RTX makes CUDA graphs by itself"
    assert by_itself or (replayed.replays.reason is None and replayed.replays.replayed)
    assert not plain.replays.replayed
