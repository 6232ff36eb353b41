"""The trainable model of examples/training: its numbers against others' of the same weights, and a short training."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from v4export.checkpoint.names import expected
from v4export.config.readers import read_config
from v4export.model.load import load_transformer
from v4export.model.transformer import empty_state

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LIMIT = 1e-4
TEXT = [f"def f{n}(x):\n    return x + {n % 7}\n\n\nclass C{n}:\n    y = f{n % 5}({n})\n" * 4 for n in range(60)]


class Training:
    """The modules of examples/training, by name."""

    def __getattr__(self, name: str):
        return importlib.import_module(f"training.{name}")


@pytest.fixture(scope="module")
def training():
    sys.path.insert(0, str(EXAMPLES))
    yield Training()
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def corpus(training):
    return training.compare.corpus(training.data.Text(TEXT[1:], TEXT[:1] * 5), window=32, vocab=400)


@pytest.fixture(scope="module")
def models(training, corpus):
    """Small models with random weights, every part of which matters."""
    torch.manual_seed(3)
    small = {"vocab_size": 400, "hidden_size": 48, "num_experts": 8, "num_layers": 3, "moe_layers": (1, 2)}
    found = {}
    for name, config in training.recipe.configs(corpus.compressed_vocab).items():
        engram = config.engram and replace(config.engram, buckets=50)
        found[name] = training.recipe.build(replace(config, **small, engram=engram)).eval()
        for tensor, value in found[name].state_dict().items():
            if "norm" in tensor or tensor.endswith(("q_weight", "k_weight")):
                value += 0.2 * torch.randn_like(value)
            elif tensor.endswith("correction_bias"):
                value += 0.1 * torch.randn_like(value)
            elif tensor.endswith("engram.embed.weight"):
                value *= 50
    return found


@pytest.fixture(scope="module")
def ids_BS(corpus) -> torch.Tensor:
    return torch.from_numpy(corpus.train[:3, :-1])


def logits_of(training, corpus, model, ids_BS: torch.Tensor) -> torch.Tensor:
    rows = training.compare.rows_of(model.config, corpus.token_map)(ids_BS.numpy())
    with torch.no_grad():
        return model(ids_BS, {layer: torch.from_numpy(one) for layer, one in rows.items()})


def test_models_are_of_the_same_active_size(training):
    sizes = {name: training.recipe.size(training.recipe.build(c)) for name, c in training.recipe.configs(1500).items()}
    for size in sizes.values():
        assert size.active == pytest.approx(sizes["plain"].active, rel=0.01)
    assert sizes["experts"].total == pytest.approx(sizes["engram"].total, rel=0.05)


def test_the_plain_model_is_deepseek_v3(training, corpus, models, ids_BS, tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = models["plain"]
    training.checkpoint.save(tmp_path, plain.config, plain.state_dict(), corpus.tokenizer)
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = hub(ids_BS, use_cache=False).logits
    assert (logits_of(training, corpus, plain, ids_BS) - theirs).abs().max() < LIMIT


@pytest.mark.parametrize("name", ["plain", "engram", "experts"])
def test_models_are_those_of_the_definition(training, corpus, models, ids_BS, tmp_path, name):
    model = models[name]
    training.checkpoint.save(tmp_path, model.config, model.state_dict(), corpus.tokenizer)
    config = read_config(tmp_path)
    assert config == model.config
    weights = model.state_dict()
    assert {one.name: one.shape for one in expected(config).values()} == {n: (*w.shape,) for n, w in weights.items()}

    twin = load_transformer(config, lambda tensor: weights[tensor])
    batch, steps = ids_BS.shape
    state = [empty_state(config, layer, torch.float32, batch) for layer in range(config.num_layers)]
    rows = training.compare.rows_of(config, corpus.token_map)(ids_BS.numpy())
    looked_up = {
        layer: weights[f"model.layers.{layer}.engram.embed.weight"][torch.from_numpy(one)].flatten(2)
        for layer, one in rows.items()
    }
    with torch.no_grad():
        every = torch.arange(steps).expand(batch, -1)
        theirs = twin(ids_BS, torch.zeros(batch, dtype=torch.int64), state, every, looked_up).logits
    assert (logits_of(training, corpus, model, ids_BS) - theirs).abs().max() < LIMIT


def test_nothing_is_known_of_later_tokens(training, corpus, models, ids_BS):
    changed = ids_BS.clone()
    changed[:, 20:] = 7
    before, after = (logits_of(training, corpus, models["engram"], ids)[:, :20] for ids in (ids_BS, changed))
    assert torch.allclose(before, after, atol=1e-5)


def test_training_lowers_the_loss_and_moves_tables(training, corpus, models):
    torch.manual_seed(0)
    model = training.recipe.build(models["engram"].config)
    start = model.tables()[0].detach().clone()
    rows = training.compare.rows_of(model.config, corpus.token_map)
    options = training.recipe.Training(tokens=16 * 32 * 24, window=32, batch=16, measurements=3)
    before = training.loop.held_out_loss(model, rows, corpus.held_out)
    run = training.loop.train(model, rows, corpus.train, corpus.held_out, options, seed=0, name="test")
    assert run.losses[-1] < run.losses[0] < before - 0.2
    assert run.tokens[-1] == options.tokens and len(run.tokens) == 3
    assert (model.tables()[0] != start).any()
    assert any(router.e_score_correction_bias.any() for router in model.routers())


def test_bytes_are_those_of_the_text(training, corpus):
    sizes = training.data.bytes_of_tokens(corpus.tokenizer)
    text = "naïve = 'é'\n\tdef f(): …\n"
    assert sizes[corpus.tokenizer.encode(text).ids].sum() == len(text.encode())


def test_batches_show_every_window_before_any_comes_again(training):
    source = training.data.batches(np.arange(10)[:, None], 4, seed=1)
    seen = np.concatenate([next(source) for _ in range(5)]).flatten()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_a_chart_has_a_line_for_each_seed_and_a_mean(training):
    lines = {"a": [[(0.5, 3.0), (1.0, 2.5)], [(0.5, 3.1), (1.0, 2.7)]], "<b>": [[(0.5, 3.0), (1.0, 2.0)]]}
    svg = training.plot.chart("title", "x", "y", lines)
    assert len(re.findall("<polyline", svg)) == 5
    assert "a 2.600" in svg and "&lt;b&gt; 2.000" in svg
