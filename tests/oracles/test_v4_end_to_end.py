"""A DeepSeek-V4 checkpoint as transformers saves it: built, verified, run, and its tokens compared with theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hub_models import hub_model
from runners import greedy

from v4export import api
from v4export.engine.options import EngineOptions
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow

NEW_TOKENS = 48
#: The released window and ratios, and widths that FP8 blocks do not divide.
CHANGES = {
    "hidden_size": 96, "moe_intermediate_size": 48, "compress_rates": {"csa": 4, "hca": 128}, "sliding_window": 128,
    "layer_types": ["window", "csa", "hca", "csa"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return hub_model("deepseek_v4", 3, **CHANGES)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "v4"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_build(saved, precision, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    options = EngineOptions(targets=("sm89",), max_chunk=32)
    built = api.build(saved, tmp_path / "out", precision=precision, max_seq_len=512, engine=options)
    assert built.verification is not None and built.engines
    assert built.verification.summary().startswith("PASSED | 4 layers")
    assert built.engines["model.onnx"].bytes == (tmp_path / "out" / "model.engine").stat().st_size > 100_000


def test_greedy_tokens(model, saved, tmp_path):
    bundle = api.export(saved, tmp_path / "out", precision="fp32", max_seq_len=512).bundle
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=512, threads=1)
    for length in (1, 50, 130, 260):
        prompt = np.random.default_rng(length).integers(2, 97, length)
        ids = torch.from_numpy(prompt)[None]
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0,
            eos_token_id=None,
        )[0, length:]  # fmt: skip
        assert greedy(executor, prompt, NEW_TOKENS) == wanted.tolist()
