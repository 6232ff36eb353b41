"""Engram in any family: transformers' own layers, each given hidden states to which a literal Engram has added.

The paper's form has a convolution, DeepSeek-V4.1's has none (``test_definition_v41.py`` has that family whole).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import literal_engram
import literal_v41
import numpy as np
import pytest
import torch
from checks import check, random_ids
from hub_models import canonical_weights, hub_config, hub_logits, hub_model
from runners import OnnxRunner, TorchRunner, run_batch, run_one
from v41_models import TableLookup

from v4export import api, presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.config import Engram, HyperConnections
from v4export.config.hashes import layouts
from v4export.config.readers import to_hub_config
from v4export.engram.hashing import Hasher
from v4export.model.load import load_transformer
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow

V41_FORM = Engram((1, 2), max_order=4, heads=2, width=16, buckets=53, compressed_vocab=61, pad_token_id=2)
PAPER_FORM = replace(V41_FORM, max_order=3, heads=3, seed=5, kernel=4, dilation=3)
FORMS = {"v41": V41_FORM, "paper": PAPER_FORM, "two taps": replace(PAPER_FORM, layers=(0,), kernel=2, dilation=1)}
FAMILIES = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4"]
CHUNKS, SINGLES = (1, 5, 22, 2, 9), 8


class Remembering:
    """A transformers model whose layers are given what Engram adds, and the project's twin of it."""

    def __init__(self, family: str, engram: Engram) -> None:
        self.hub = hub_model(family)
        plain = hub_config(self.hub)
        self.config = replace(plain, engram=engram)
        self.streams = plain.hyper.streams if plain.hyper else 1
        self.words = literal_v41.random_token_map(plain.vocab_size, engram.compressed_vocab)
        self.weights = {
            layer: literal_engram.random_weights(
                self.streams, plain.hidden_size, engram.row_dim, layout.rows, engram.width, engram.kernel, layer
            )
            for layer, layout in layouts(engram).items()
        }
        own = {f"model.layers.{i}.engram.{n}": w for i, some in self.weights.items() for n, w in some.items()}
        every = canonical_weights(self.hub) | own
        self.model = load_transformer(self.config, lambda name: every[name])
        tables = {layer: some["embed.weight"].numpy() for layer, some in self.weights.items()}
        self.lookup = TableLookup(Hasher.of(engram, self.words.astype(np.int32)), tables)

    def reference(self, ids: np.ndarray) -> np.ndarray:
        """transformers' logits [S, V], Engram's part literal."""
        text = literal_engram.keys_of(self.config.engram)
        hooks = []
        for layer, weights in self.weights.items():
            found = literal_engram.found(text, self.words, weights["embed.weight"], layer, ids.tolist())

            def add(_m: Any, args: Any, kwargs: Any, found: Any = found, weights: Any = weights) -> Any:
                hidden = args[0]
                streams = hidden[0].reshape(len(ids), self.streams, -1)
                rest = {name: value for name, value in weights.items() if name != "embed.weight"}
                dilation = self.config.engram.dilation
                more = literal_engram.added(streams, found, rest, self.config.rms_norm_eps, dilation)
                return (hidden + more.float().reshape(hidden.shape), *args[1:]), kwargs

            hooks.append(self.hub.model.layers[layer].register_forward_pre_hook(add, with_kwargs=True))
        try:
            return hub_logits(self.hub, torch.from_numpy(ids)[None])[0].numpy()
        finally:
            for hook in hooks:
                hook.remove()

    def runner(self, batch: int) -> TorchRunner:
        return TorchRunner(self.model, batch, self.lookup)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_definition(family: str, form: str) -> None:
    both = Remembering(family, FORMS[form])
    ids = random_ids(sum(CHUNKS) + SINGLES)
    theirs = both.reference(ids)
    check(run_one(both.runner(1), ids, CHUNKS, SINGLES), theirs)
    assert np.abs(theirs - hub_logits(both.hub, torch.from_numpy(ids)[None])[0].numpy()).max() > 0.1


def test_unequal_lengths() -> None:
    both = Remembering("deepseek_v3", PAPER_FORM)
    sequences = [random_ids(length, seed) for seed, length in enumerate((33, 6, 20))]
    for ids, logits in zip(sequences, run_batch(both.runner(3), sequences, 9), strict=True):
        check(logits, both.reference(ids))


def test_check_would_see_a_wrong_number() -> None:
    both, ids = Remembering("deepseek_v3", PAPER_FORM), random_ids(40)
    theirs = both.reference(ids)
    for name in ("engram.conv.weight", "engram.conv.norm", "engram.q_weight"):
        parameter = both.model.layers[1].get_parameter(name)
        parameter.data *= 1.01
        with pytest.raises(AssertionError):
            check(run_one(both.runner(1), ids, (40,), 0), theirs)
        parameter.data /= 1.01


OWN = {"latent attention": ("v4x", PAPER_FORM, None), "with streams": ("v4x", PAPER_FORM, HyperConnections(2, 5, 1e-6)),
       "tables beside an indexer": ("tiny-v3.2", V41_FORM, None)}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_exported(name: str, tmp_path: Path) -> None:
    """A checkpoint on disk through the whole pipeline: verified, and its graph equal to the definition."""
    family, engram, hyper = OWN[name]
    base = presets.load("tiny-v3" if family == "v4x" else family)
    config = replace(base, engram=replace(engram, layers=(1,)), hyper=hyper or base.hyper)
    config = replace(config, family="v4x", fp8=None) if family == "v4x" else config
    (tmp_path / "config.json").write_text(json.dumps(to_hub_config(config)))
    hub = api.synth(str(tmp_path / "config.json"), tmp_path / "hub")
    built = api.build(hub, tmp_path / "out", precision="fp32", engine=None)
    assert built.verification is not None and built.verification.passed
    checkpoint, bundle = Checkpoint.open(hub), built.bundle
    weights = {n: torch.from_numpy(w.decode()) for n, w in audit(checkpoint).weights.items()}
    how = {"max_seq_len": bundle.max_seq_len, "threads": 1}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    assert executor._lookup is not None
    model = load_transformer(checkpoint.config, lambda one: weights[one])
    ids = np.random.default_rng(0).integers(3, 256, 61)
    theirs = run_one(TorchRunner(model, 1, executor._lookup), ids, (61,), 0)
    check(run_one(OnnxRunner(executor, 1), ids, (1, 30, 7), 23), theirs)
