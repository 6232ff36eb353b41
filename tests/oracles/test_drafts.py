"""Layers that draft: transformers' for DeepSeek-V3, and a literal one for V4; the definition and exported graphs.

What a layer is given, and hands on, is compared as well: transformers goes on from what follows the last norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import torch_state
from checks import LIMIT, check, random_ids
from hub_models import canonical_weights, hub_config, hub_model, yarn
from literal_drafts import Layer
from runners import TorchRunner
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from v4export import api, presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.config.chosen import Chosen
from v4export.model.load import load_transformer
from v4export.model.transformer import Transformer
from v4export.opened import open_checkpoint
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.state import State

pytestmark = pytest.mark.slow

PROMPT, AHEAD = 60, 4
CHUNKS = (1, 5, 20, 33)
V3 = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "rms_norm_eps": 1e-5, **yarn()}


class Drafts(Protocol):
    """Something with a layer that drafts, over one sequence: features of its tokens, and drafts after them."""

    def features(self, tokens: np.ndarray) -> np.ndarray: ...

    def draft(self, tokens: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class OfTransformers:
    """transformers' model, and its layer with random weights."""

    def __init__(self, **changes: Any) -> None:
        self.model = hub_model("deepseek_v3", num_mtp_layers=1, **changes)
        self.layer = MtpModel(self.model, 1).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in [*self.layer.layers.named_parameters(), *self.layer.layers.named_buffers()]:
                norm = "norm" in name and name.endswith("weight")
                p.copy_(1 + 0.2 * torch.randn_like(p) if norm else torch.randn_like(p) / p.shape[-1] ** 0.5)
        self.cache, self.held = MtpCache(config=self.model.config.get_mtp_config()), 0

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """All of them by the Hub's names."""
        own = f"model.layers.{self.model.config.num_hidden_layers}."
        found = canonical_weights(self.model)
        for name, value in canonical_weights(self.layer.layers).items():
            leaf = name.removeprefix("0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            found[own + leaf] = value
        return found

    def features(self, tokens: np.ndarray) -> np.ndarray:
        """What its generation hands to the layer."""
        with torch.no_grad():
            out = self.model(torch.from_numpy(tokens)[None], use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0].numpy()

    def draft(self, tokens: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The layer, over those that it has had before."""
        # It counts from the token that is given; of rotations only differences matter.
        at = self.held + 1 + torch.arange(len(tokens))[None]
        self.held += len(tokens)
        with torch.no_grad():
            given = (torch.from_numpy(features)[None], at, self.cache, torch.from_numpy(tokens)[None])
            handed = self.layer.forward_layer(0, *given)
            return self.layer._project_to_logits(handed)[0].numpy(), handed[0].numpy()


class Definition:
    """This project's definition; the layer over the runtime's state."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.state = State.empty(model.config.drafter, 1, np.dtype(np.float32), 10_000)
        for buffer in self.state.buffers:
            buffer.array[:] = 7.0

    def features(self, tokens: np.ndarray) -> np.ndarray:
        none, every = torch.zeros(1, dtype=torch.int64), torch.arange(len(tokens))[None]
        runner = TorchRunner(self.model, 1)
        with torch.no_grad():
            *given, _ = runner._given(tokens[None], np.array([len(tokens)]))
            out = self.model(*given, every, None, none)
        return out.features[0].numpy()

    def draft(self, tokens: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        state, every = self.state, torch.arange(len(tokens))[None]
        state.reserve(len(tokens))
        held = {name: torch_state.held(state.held(0, name)) for name in state.layers[0]}
        given = (torch.from_numpy(v)[None] for v in (tokens, features))
        ids, streams = given
        with torch.no_grad():
            out = self.model.drafter(ids, torch.from_numpy(state.lengths_B), streams, held, every)
        for name, new in out.rows.items():
            torch_state.put(state.room(0, name), new)
        state.commit(np.array([len(tokens)]))
        return out.logits[0].numpy(), out.features[0].numpy()


class Graph:
    """An exported graph through onnxruntime."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        bundle = api.export(checkpoint, out, precision="fp32", max_seq_len=256, draft=True).bundle
        made = (bundle.folder, bundle.config, bundle.precision)
        self.executor = OnnxExecutor(*made, max_seq_len=bundle.max_seq_len, threads=1)
        self.state = self.executor.new_draft_state()

    def features(self, tokens: np.ndarray) -> np.ndarray:
        state, none = self.executor.new_state(), np.zeros((1, 0), np.int64)
        found = []
        for start in range(0, len(tokens), 23):
            self.executor.step(tokens[None, start : start + 23], state, logits_at_BQ=none)
            found.append(self.executor.features[0])
        return np.concatenate(found)

    def draft(self, tokens: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        every, lengths_B = np.arange(len(tokens))[None], np.array([len(tokens)])
        logits, handed = self.executor.draft(
            tokens[None], features[None], self.state, logits_at_BQ=every, lengths_B=lengths_B
        )
        return logits[0], handed[0]


def drafted(one: Drafts, tokens: np.ndarray, features: np.ndarray, chunks: Sequence[int]) -> list[np.ndarray]:
    """Logits of a sequence in chunks, then of a few tokens ahead of it, each the likeliest after those before."""
    found, at = [], 0
    for size in chunks:
        logits, handed = one.draft(tokens[at + 1 : at + size + 1], features[at : at + size])
        found.append(logits)
        at += size
    assert at == len(tokens) - 1
    for _ in range(AHEAD):
        logits, handed = one.draft(found[-1][-1:].argmax(-1), handed[-1:])
        found.append(logits)
    return [np.concatenate(found)]


def agree(ours: Drafts, theirs: Drafts) -> None:
    """What is handed over is the same, and so are the drafts."""
    tokens = random_ids(PROMPT)
    mine, features = ours.features(tokens), theirs.features(tokens)
    assert np.abs(mine - features).max() <= LIMIT * np.abs(features).max()
    (wanted,) = drafted(theirs, tokens, features, [PROMPT - 1])
    (found,) = drafted(ours, tokens, mine, CHUNKS)
    check(found, wanted)


@pytest.mark.parametrize("changes", [{}, V3], ids=["plain", "groups and yarn"])
def test_the_definition_drafts_as_transformers_does(changes):
    theirs = OfTransformers(**changes)
    config = replace(hub_config(theirs.model), drafts=True)
    agree(Definition(load_transformer(config, lambda name: theirs.weights[name])), theirs)


def test_the_graph_drafts_as_transformers_does(tmp_path):
    theirs = OfTransformers(**V3)
    config = replace(hub_config(theirs.model), drafts=True)
    synth(config, tmp_path / "hub")
    rewrite(tmp_path / "hub", theirs.weights)
    agree(Graph(tmp_path / "hub", tmp_path / "out"), theirs)


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Give a checkpoint other values."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: weights[name].float().contiguous() for name in load_file(file)}, file)


class Literal:
    """The literal layer over a definition's features."""

    def __init__(self, definition: Definition, layer: Layer) -> None:
        self.features, self.draft = definition.features, layer.draft


@pytest.fixture(scope="module")
def v4(tmp_path_factory) -> tuple[Path, ModelConfig, dict[str, np.ndarray]]:
    """A small V4 with a short window, in DeepSeek's own names."""
    small = presets.load("tiny-v4").first_layers(2)
    window = replace(small.compressed, window=16)
    config = replace(small, left_out_layers=0, num_mtp_layers=1, drafts=True, compressed=window)
    folder = synth(config, tmp_path_factory.mktemp("v4") / "hub", dtype="float32")
    account = audit(open_checkpoint(folder, Chosen(draft=True)))
    return folder, config, {name: weight.decode() for name, weight in account.weights.items()}


def literal(config: ModelConfig, weights: dict[str, np.ndarray]) -> Literal:
    own = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
    prefix = f"model.layers.{config.num_layers}."

    def found(name: str) -> np.ndarray:
        return weights[own.get(name, prefix + name)].astype(np.float64)

    model = load_transformer(config, lambda name: torch.from_numpy(weights[name]))
    return Literal(Definition(model), Layer(config, found))


def test_the_definition_drafts_as_the_literal_layer_of_v4(v4):
    _, config, weights = v4
    model = load_transformer(config, lambda name: torch.from_numpy(weights[name]))
    agree(Definition(model), literal(config, weights))


def test_the_graph_drafts_as_the_literal_layer_of_v4(v4, tmp_path):
    folder, config, weights = v4
    agree(Graph(folder, tmp_path / "out"), literal(config, weights))
