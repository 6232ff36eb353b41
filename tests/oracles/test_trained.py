"""A trained checkpoint through onnxruntime, against transformers' own generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hub_models import hub_logits
from runners import OnnxRunner, greedy, run_one

from v4export import api
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
LIMIT = 1e-5


@pytest.fixture(scope="module")
def hub(trained_checkpoint):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=torch.float32).eval()
    # The comparison is of all tokens, so nothing may end it early.
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def executor(trained_checkpoint, tmp_path_factory) -> OnnxExecutor:
    out = tmp_path_factory.mktemp("trained") / "bundle"
    bundle = api.export(trained_checkpoint, out, precision="fp32").bundle
    return OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len, threads=1)


@pytest.fixture(scope="module")
def prompts(trained_checkpoint: Path, hub) -> list[np.ndarray]:
    """Held-out text where there is some, and random ids."""
    rng = np.random.default_rng(5)
    found = [rng.integers(2, hub.config.vocab_size, length) for length in (1, 30)]
    text, vocabulary = trained_checkpoint / "heldout.txt", trained_checkpoint / "tokenizer.json"
    if text.is_file() and vocabulary.is_file():
        tokenizers = pytest.importorskip("tokenizers")
        ids = np.array(tokenizers.Tokenizer.from_file(str(vocabulary)).encode(text.read_text()[:20000]).ids)
        found += [ids[start : start + length] for start, length in ((0, 5), (200, 40), (1000, 128), (2500, 17))]
    return found


def test_greedy_tokens(hub, executor, prompts):
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        wanted = hub.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )[0, len(prompt) :]
        assert greedy(executor, prompt, NEW_TOKENS) == wanted.tolist()
        assert len(wanted) == NEW_TOKENS


def test_logits(hub, executor, prompts):
    for prompt in prompts:
        theirs = hub_logits(hub, torch.from_numpy(prompt)[None])[0].numpy()
        half = len(prompt) // 2
        ours = run_one(OnnxRunner(executor, 1), prompt, [n for n in (half, len(prompt) - half) if n], 0)
        assert np.abs(ours - theirs).max() <= LIMIT * np.abs(theirs).max()
