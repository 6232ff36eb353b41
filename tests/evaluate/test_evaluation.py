"""What ``v4export eval`` measures, against computing the same slowly with whole models."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small

from v4export import api
from v4export.checkpoint.audit import Weight, audit
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.engram.vocabulary import read_token_map
from v4export.evaluate.budget import Budget
from v4export.evaluate.evaluation import measure, steps
from v4export.evaluate.products import WidenedProducts
from v4export.evaluate.recipes import Subject
from v4export.evaluate.results import FP8_STATE, RecipeResult
from v4export.evaluate.windows import Windows
from v4export.graphs.weights import place
from v4export.model.load import load_transformer
from v4export.precision import precision
from v4export.runtime.tokenizer import load_tokenizer
from v4export.verify.looked_up import EngramReference
from v4export.verify.rounded import as_the_graph_holds

HELDOUT = Path(__file__).parents[2] / "examples" / "tiny-v3" / "heldout.txt"
FAMILIES = ("tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x")


def subject(folder: Path, config: ModelConfig | None = None) -> Subject:
    checkpoint = api.open_checkpoint(folder)
    config = config or checkpoint.config
    words = read_token_map(folder, config.engram, config.vocab_size) if config.engram else None
    return Subject(config, audit(checkpoint, scan_values=False).weights, words)


def measured(of: Subject, names: list[str], ids: np.ndarray, windows: int = 2, **how: bool) -> dict[str, RecipeResult]:
    lanes, _ = of.lanes(names, how.pop("keep", ()), how.pop("state_fp8", False))  # type: ignore[arg-type]
    cut = Budget(windows, 7, 0, 0, how.pop("on_disk", False))
    advanced: list[float] = []
    found = measure(of, lanes, Windows(ids, ids.size), cut, advance=advanced.append)
    assert sum(advanced) == steps(of, lanes, Windows(ids, ids.size), cut, None)
    return {one.name: one for one in found}


def log_probabilities(of: Subject, name: str, ids: np.ndarray, state_fp8: bool = False) -> np.ndarray:
    """Predictions [n, S, V] by a whole model, a window at a time, without chunks and without widened products."""
    recipe = precision(name, of.config)
    config, dtype = dataclasses.replace(of.config, state_fp8=state_fp8), getattr(torch, recipe.activations)
    held = {n: torch.from_numpy(as_the_graph_holds(w, recipe)) for n, w in of.weights.items()}
    model = load_transformer(config, lambda n: held[n], dtype=dtype)
    found = []
    for window in ids:
        engram = None
        if config.engram:
            rows = EngramReference(config, dict(of.weights), recipe, of.token_map)
            engram = {
                i: torch.from_numpy(rows.rows(i, window[:0], window)[None]).to(dtype) for i in config.engram.layers
            }
        every = torch.arange(len(window))[None]
        with torch.no_grad():
            step = model(torch.from_numpy(window[None]), torch.zeros(1).long(), model.empty_state(), every, engram)
        found.append(step.logits[0].double().log_softmax(-1).numpy())
    return np.stack(found)


def check(found: RecipeResult, wanted: np.ndarray, own: np.ndarray, ids: np.ndarray, tolerance: float) -> None:
    """Every figure, token by token."""
    nll, ratio, divergence, same, moved = [], [], [], [], []
    for b in range(len(ids)):
        for s in range(ids.shape[1] - 1):
            p, q, token = wanted[b, s], own[b, s], ids[b, s + 1]
            nll.append(-q[token])
            ratio.append(p[token] - q[token])
            divergence.append(float(np.dot(np.exp(p), p - q)))
            same.append(p.argmax() == q.argmax())
            moved.append(math.exp(q[token]) - math.exp(p[token]))
    quality, n = found.quality, len(nll)
    assert quality is not None and n == ids.shape[0] * (ids.shape[1] - 1)
    near = {"rel": tolerance, "abs": tolerance}
    # Of one token: what another order of sums makes of bfloat16 is not averaged out.
    single = {"rel": 10 * tolerance, "abs": 10 * tolerance}
    assert quality.perplexity == pytest.approx(math.exp(sum(nll) / n), **near)
    assert quality.perplexity_error == pytest.approx(quality.perplexity * np.std(nll, ddof=1) / n**0.5, **near)
    assert quality.change == pytest.approx(math.exp(sum(ratio) / n) - 1, **near)
    assert quality.divergence == pytest.approx(sum(divergence) / n, **near)
    assert quality.divergence_max == pytest.approx(max(divergence), **single)
    assert quality.divergence_median == pytest.approx(float(np.median(divergence)), **near)
    assert quality.divergence_99 == pytest.approx(float(np.quantile(divergence, 0.99)), **single)
    assert quality.top1 == pytest.approx(sum(same) / n, abs=1.5 / n if tolerance > 1e-6 else 1e-12)
    assert quality.probability_rms == pytest.approx(math.sqrt(sum(x * x for x in moved) / n), **near)


@pytest.fixture(scope="module")
def trained(trained_checkpoint: Path) -> Subject:
    return subject(trained_checkpoint)


@pytest.fixture(scope="module")
def text_ids(trained_checkpoint: Path) -> np.ndarray:
    """A few windows of text, the last batch of which is not full."""
    ids = load_tokenizer(trained_checkpoint).encode(HELDOUT.read_text()[:2000])
    return np.array(ids[: 3 * 24], np.int64).reshape(3, 24)


def test_reference_and_recipes_are_those_of_whole_models(trained, text_ids):
    found = measured(trained, ["int4", "bf16"], text_ids)
    wanted = log_probabilities(trained, "fp32", text_ids)
    check(found["fp32"], wanted, wanted, text_ids, 1e-6)
    assert found["fp32"].quality.divergence == 0 and found["fp32"].quality.top1 == 1
    for name in ("int4", "bf16"):
        check(found[name], wanted, log_probabilities(trained, name, text_ids), text_ids, 2e-3)


def test_the_reference_is_transformers(trained_checkpoint, trained, text_ids):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        loss = theirs(torch.from_numpy(text_ids), labels=torch.from_numpy(text_ids)).loss
    found = measured(trained, ["fp32"], text_ids)["fp32"]
    assert found.quality.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.fixture(scope="module")
def random_subject(tmp_path_factory):
    made: dict[str, Subject] = {}

    def make(preset: str) -> Subject:
        if preset not in made:
            folder = synth(small(preset), tmp_path_factory.mktemp("hub") / preset)
            made[preset] = subject(folder)
        return made[preset]

    return make


@pytest.mark.parametrize("preset", FAMILIES)
def test_layers_one_by_one_are_the_whole_model(random_subject, preset):
    of = random_subject(preset)
    ids = np.random.default_rng(0).integers(3, of.config.vocab_size, (3, 24))
    found = measured(of, ["fp8"], ids, on_disk=True)
    (reference, own) = found.values()
    wanted = log_probabilities(of, "fp32", ids)
    check(reference, wanted, wanted, ids, 1e-5)
    check(own, wanted, log_probabilities(of, own.name, ids), ids, 0.05)
    assert [one.layer for one in own.layers] == [*range(of.config.num_layers)]


def test_cached_rows_in_fp8_are_a_recipe_of_their_own(trained, text_ids):
    found = measured(trained, ["fp32", "fp8"], text_ids, state_fp8=True)
    assert [*found] == ["fp32", "fp32" + FP8_STATE, "fp8", "fp8" + FP8_STATE]
    wanted = log_probabilities(trained, "fp32", text_ids)
    own = log_probabilities(trained, "fp32", text_ids, state_fp8=True)
    check(found["fp32" + FP8_STATE], wanted, own, text_ids, 1e-5)
    # Of each layer 64 columns as E4M3, their multiplier in float32, and 16 rotated ones in 16 bits.
    assert (found["fp8"].state_bytes_per_token, found["fp8" + FP8_STATE].state_bytes_per_token) == (4 * 160, 4 * 100)
    assert found["fp8" + FP8_STATE].bytes == found["fp8"].bytes


def test_errors_of_layers_are_their_own_and_carried(trained, text_ids):
    """In float32 but for FP8 weights of a layer: it alone has an error of its own, and all after it carry it."""
    lane = trained.lane(precision("fp32").kept(["fp8:layers.2.*"]))
    found = measure(trained, [lane], Windows(text_ids, text_ids.size), Budget(2, 7, 0, 0, False))[1]
    own, carried = ([getattr(one, which) for one in found.layers] for which in ("own", "carried"))
    assert own[0] == own[1] == carried[0] == carried[1] == 0
    assert own[2] == carried[2] > 1e-3 and own[3] == 0 and carried[3] > 1e-3
    assert found.worst.layer == 2
    exact, held = (_hidden(trained, which) for which in ("none", "model.layers.2."))
    difference = [(held(ids)[2] - exact(ids)[2]).norm(dim=-1) / exact(ids)[2].norm(dim=-1) for ids in text_ids]
    assert own[2] == pytest.approx(float(torch.cat(difference).square().mean().sqrt()), rel=1e-4)


def _hidden(of: Subject, rounded: str):
    """From tokens to hidden states after every layer of a whole model, weights whose name begins so in FP8."""

    def value(weight: Weight) -> torch.Tensor:
        name = "fp8" if weight.name.startswith(rounded) and weight.role in ("linear", "expert") else "fp32"
        return torch.from_numpy(as_the_graph_holds(weight, precision(name, of.config)))

    model = load_transformer(of.config, lambda name: value(of.weights[name]))

    def hidden(ids: np.ndarray) -> list[torch.Tensor]:
        at = torch.arange(1)[None]
        with torch.no_grad():
            return model(torch.from_numpy(ids[None]), torch.zeros(1).long(), model.empty_state(), at).hidden

    return hidden


def test_first_layers_have_errors_and_no_predictions(trained_checkpoint, text_ids):
    checkpoint = api.open_checkpoint(trained_checkpoint)
    of = subject(trained_checkpoint, checkpoint.config.first_layers(2))
    found = measured(of, ["int4"], text_ids)
    whole = measured(subject(trained_checkpoint), ["int4"], text_ids)
    assert found["int4"].quality is None and found["int4"].layers == whole["int4"].layers[:2]


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4", "int4", "nvfp4"])
def test_bytes_are_those_that_an_export_places(trained, tmp_path, name):
    recipe = precision(name, trained.config)
    placed = place(trained.weights.values(), recipe, tmp_path)
    found, numbers = trained.sized(trained.lane(recipe)), sum(math.prod(w.shape) for w in trained.weights.values())
    assert found.bytes == placed.pointed_bytes + placed.written_bytes == sum(t.nbytes for t in placed.tensors.values())
    assert found.bits_per_weight == pytest.approx(8 * found.bytes / numbers)


def test_widened_products_are_pytorchs_own():
    rng = torch.Generator().manual_seed(0)
    products = (torch.nn.functional.linear, lambda x, w: torch.matmul(x, w.mT), lambda x, w: x @ w.mT)
    for dtype, product in itertools.product((torch.bfloat16, torch.float16), products):
        x, w = (torch.randn(rows, 64, generator=rng).to(dtype) for rows in (9, 32))
        with WidenedProducts():
            found = product(x, w)
        assert found.dtype == dtype
        # Sums in another order may be rounded to the next number.
        torch.testing.assert_close(found, product(x, w), rtol=torch.finfo(dtype).eps, atol=1e-4)
