"""Trainable reasoning layers: their numbers against the definition's, their losses, a training, and its checkpoint."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from v4export import presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.config.readers import read_config
from v4export.engram.vocabulary import compress
from v4export.model.load import load_transformer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHIPPED = EXAMPLES / "tiny-v4x"
LIMIT = 1e-5  # of the largest number
TEXT = [f"def f{n}(x):\n    return x + {n % 7}\n\n\nclass C{n}:\n    y = f{n % 5}({n})\n" * 4 for n in range(60)]


@pytest.fixture(scope="module")
def training():
    """The modules of examples/training, by name."""
    sys.path.insert(0, str(EXAMPLES))
    names = ("checkpoint", "compare", "data", "loop", "look_ahead", "pausing", "recipe", "thoughts")
    yield SimpleNamespace(**{name: importlib.import_module(f"training.{name}") for name in names})
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def corpus(training):
    return training.compare.corpus(training.data.Text(TEXT[1:], TEXT[:1] * 5), window=24, vocab=400)


@pytest.fixture(scope="module")
def config(training, corpus):
    full = training.recipe.full(400, corpus.compressed_vocab)
    return replace(full, engram=replace(full.engram, buckets=50))


@pytest.fixture(scope="module")
def saved(training, corpus, config, tmp_path_factory):
    """A checkpoint with random weights, every part of which matters, and the model read from it."""
    torch.manual_seed(3)
    model = training.recipe.build(config)
    for name, value in model.state_dict().items():
        if "norm" in name or name.endswith(("q_weight", "k_weight", "bias")):
            value += 0.2 * torch.randn_like(value)
        elif name.endswith("talk_head.4.weight"):
            value += 0.3 * torch.randn_like(value)
    folder = tmp_path_factory.mktemp("saved")
    weights = training.checkpoint.in_bfloat16(config, model.state_dict())
    training.checkpoint.save(folder, config, weights, corpus.tokenizer)
    return folder, loaded(training, folder)


def loaded(training, folder: Path):
    """The trainable model of a checkpoint."""
    model = training.recipe.build(read_config(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def both(training, corpus, saved):
    """A few windows through the trainable model, and through the definition, whose state then holds them."""
    folder, model = saved
    weights = {name: one.float() for name, one in load_file(folder / "model.safetensors").items()}
    config = read_config(folder)
    twin = load_transformer(config, lambda tensor: weights[tensor])
    ids_BS = torch.from_numpy(corpus.train[:3, :-1])
    rows = training.loop.looked_up(training.compare.rows_of(config, corpus.token_map), ids_BS.numpy())
    values = {n: weights[f"model.layers.{n}.engram.embed.weight"][one].flatten(2) for n, one in rows.items()}
    with torch.no_grad():
        trunk_BSD = model.model(ids_BS, rows)
        every_BS = torch.arange(ids_BS.shape[1]).expand(ids_BS.shape)
        step = twin(ids_BS, torch.zeros(3, dtype=torch.int64), twin.empty_state(3), every_BS, values)
    return SimpleNamespace(model=model, twin=twin, ids=ids_BS, trunk=trunk_BSD, step=step, state=step.rows)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max()


def test_a_checkpoint_has_the_tensors_of_the_vocabulary(saved):
    folder, model = saved
    assert {*audit(Checkpoint.open(folder)).weights} == {*model.state_dict()}


def test_before_training_thoughts_change_nothing(training, config, both):
    torch.manual_seed(0)
    model = training.recipe.build(config)
    with torch.no_grad():
        trunk_BSD = torch.randn(both.trunk.shape)
        thoughts = model.think(trunk_BSD, both.ids, torch.arange(both.ids.shape[1]).expand(both.ids.shape))
        assert not thoughts.weight.any()
        assert_close(thoughts.mixed[:, :, 0], model.logits(trunk_BSD))
        assert (thoughts.alone[:, :, 0] - model.logits(trunk_BSD)).abs().max() > 0.1


def test_plain_predictions_are_those_of_the_definition(both):
    assert_close(both.model.logits(both.trunk), both.step.logits)


def test_thoughts_are_those_of_the_definition(both):
    about_BQ = torch.tensor([[0, 5, 6, 23], [1, 2, 11, 19], [0, 7, 20, 22]])
    picked_BQD = both.step.trunk.gather(1, about_BQ[..., None].expand(-1, -1, both.trunk.shape[-1]))
    with torch.no_grad():
        found = both.model.think(both.trunk, both.ids, about_BQ)
        wanted = both.twin.think(picked_BQD, about_BQ, both.state)
    assert wanted.weight.abs().min() > 0.01
    assert_close(found.weight[..., 0], wanted.weight)
    assert_close(found.mixed[:, :, 0], wanted.logits)


def test_tokens_that_follow_a_thought_are_fed_on_behind_it(both):
    about_BQ, ahead = torch.tensor([[0, 9], [3, 4], [17, 20]]), 4
    head, latents = both.twin.head, [layer["latent"] for layer in both.state[both.twin.config.num_layers :]]
    z_BQD = both.step.trunk.gather(1, about_BQ[..., None].expand(-1, -1, both.trunk.shape[-1]))
    own = [latent.new_empty(0, *about_BQ.shape, latent.shape[-1]) for latent in latents]
    vocab, steps = both.twin.config.vocab_size, both.twin.config.reasoning.steps
    wanted = []
    with torch.no_grad():
        found = both.model.think(both.trunk, both.ids, about_BQ, ahead)
        token_BQ = torch.full_like(about_BQ, vocab)
        for k in range(1, steps + ahead):
            if k >= steps:
                token_BQ = (
                    both.ids.gather(1, about_BQ + k - steps) if k > steps else torch.full_like(about_BQ, vocab + 1)
                )
            z_BQD, token_BQ, own, _ = head.step(z_BQD, token_BQ, about_BQ, *latents, *own)
            if k >= steps:
                plain_at = (about_BQ + k - steps)[..., None].expand_as(z_BQD)
                wanted.append(head.mix(both.step.trunk.gather(1, plain_at), z_BQD)[0])
    assert_close(found.mixed, torch.stack(wanted, 2))


def test_a_thought_knows_nothing_of_later_tokens_and_other_thoughts(both):
    about_BQ = torch.tensor([[4, 9], [8, 9], [0, 9]])
    changed = torch.cat([both.trunk[:, :10], torch.randn(3, 14, both.trunk.shape[-1])], 1)
    with torch.no_grad():
        side_by_side = both.model.think(both.trunk, both.ids, about_BQ).mixed
        alone = both.model.think(changed, both.ids, about_BQ[:, 1:]).mixed
    assert_close(side_by_side[:, 1:], alone)


def test_thoughts_that_help_more_become_likelier(training):
    logits_V = torch.zeros(3, requires_grad=True)
    log_prob_BQ = logits_V.log_softmax(-1)[None]  # three thoughts of a token each, one of every token
    training.look_ahead.reinforce(log_prob_BQ, torch.tensor([[0.9, 0.1, 0.2]])).backward()
    downhill = -logits_V.grad
    assert downhill[0] > 0 > downhill[1] and 0 > downhill[2] > downhill[1]


def test_the_policy_term_trains_what_draws(training, corpus, saved):
    model, rows = saved[1], training.compare.rows_of(saved[1].config, corpus.token_map)
    grads = []
    for policy in (1e-9, 1.0):
        torch.manual_seed(1)
        training.look_ahead.LookAhead(8, 3, policy=policy)(model, rows, corpus.train[:4]).backward()
        grads.append(model.model.reasoning.start_embedding.grad)
        model.zero_grad()
    assert (grads[0] - grads[1]).abs().max() > 1e-3 * grads[0].abs().max() > 0


def test_positions_are_different_and_have_what_is_ahead(training):
    found = training.look_ahead.some_positions(5, 12, 9, ahead=3)
    assert found.shape == (5, 9) and found.max() <= 9 and (found.diff() > 0).all()
    assert training.look_ahead.some_positions(2, 4, 99, ahead=2).tolist() == [[0, 1, 2]] * 2


def test_the_threshold_keeps_what_is_asked_for(training):
    plain, mixed = torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([1.1, 1.9, 1.0, 1.2])
    entropy = torch.tensor([2.01, 1.51, 0.99, 0.3])
    found = training.pausing.Predictions(plain, mixed, entropy, torch.zeros(4))
    assert found.auto(1.7) == (pytest.approx(5.1 / 4), 0.25)
    # Thinking everywhere gains 0.8 in all: the first alone gives 0.9, and is what is thought about up to its entropy.
    assert training.pausing.best_threshold(found, vocab=400, keep=0.8) == 2.0
    worse = replace(found, mixed=plain + 1)
    assert worse.auto(training.pausing.best_threshold(worse, vocab=400, keep=0.8))[1] == 0.0


@pytest.mark.slow
def test_a_short_training_writes_a_checkpoint(training, tmp_path):
    folder = tmp_path / "out"
    command = [EXAMPLES / "train_reasoning.py", "--files", "12", "--tokens", "8000", "--more-tokens", "8000"]
    command += ["--window", "64", "--positions", "16", "--ahead", "2", "--policy", "0.1", "--threads", "1", "--control"]
    done = subprocess.run(
        [sys.executable, *command, "--save", folder, "--json", tmp_path / "all.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| never | 0.0% |" in done.stdout and "| always | 100.0% |" in done.stdout and "(chosen)" in done.stdout
    config = read_config(folder)
    assert config.family == "v4x" and config.engram and config.reasoning
    found = audit(Checkpoint.open(folder))
    assert any(name.startswith("model.reasoning.layers.1.") for name in found.weights)
    assert {*loaded(training, folder).state_dict()} == {*found.weights}
    said = json.loads((folder / "training.json").read_text())
    assert said == json.loads((tmp_path / "all.json").read_text())
    assert said["reasoning"]["threshold"] == config.reasoning.threshold
    assert said["thinking"]["losses"][-1] < said["alone"]["losses"][0]
    assert len((folder / "heldout.txt").read_text()) > 1000


def test_the_shipped_checkpoint_thinks_to_effect(training):
    model, tokenizer = loaded(training, SHIPPED), Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    config = read_config(SHIPPED)
    assert config == presets.load("tiny-v4x")
    text = (SHIPPED / "heldout.txt").read_text(encoding="utf-8")[:8000]
    windows = training.data.windows(tokenizer, [text], 256)
    token_map, _ = compress(tokenizer, config.vocab_size, config.pad_token_id)
    found = training.pausing.predictions(model, training.compare.rows_of(config, token_map), windows)
    pausing, share = found.auto(config.reasoning.threshold)
    assert found.mixed.mean() < found.plain.mean() and pausing < found.plain.mean()
    assert 0.1 < share < 0.9
