"""Thoughts through onnxruntime: two forms of the same, which leave nothing behind; and a model without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from traced import export_bundle

from v4export import api, presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import Reasoning
from v4export.errors import BadInput
from v4export.model.load import fill
from v4export.model.reasoning import ThinkingHead
from v4export.package.bundle import Bundle
from v4export.runtime.generate import Event, generate
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing, Thought
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.state import State
from v4export.runtime.thinking import Thinker

pytestmark = pytest.mark.slow

STEPS = 3
CONFIG = replace(presets.load("tiny-v3"), reasoning=Reasoning(1, STEPS))
IDS = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 200)
LENGTH = 12
UNEQUAL = [9, 1, 4]
#: Largest difference of two forms of a thought, and of two ways to group thoughts, as a part of the largest number.
SAME, REGROUPED = 1e-6, 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random checkpoint with reasoning layers; its other tensors are those of ``tiny_checkpoint``."""
    return synth(CONFIG, tmp_path_factory.mktemp("thinking") / "hub")


@pytest.fixture(scope="module")
def bundle(checkpoint) -> Bundle:
    return export_bundle(checkpoint, checkpoint.with_name("fp32"), "fp32")


@pytest.fixture(scope="module")
def unthinking(checkpoint) -> Bundle:
    """Exported with ``--think-steps 0``."""
    return export_bundle(checkpoint, checkpoint.with_name("without"), "fp32", think_steps=0)


@pytest.fixture(scope="module")
def executor(bundle) -> OnnxExecutor:
    return executor_of(bundle)


@pytest.fixture(scope="module")
def head(checkpoint) -> ThinkingHead:
    """The definition's."""
    weights, made = audit(Checkpoint.open(checkpoint)).weights, ThinkingHead(CONFIG)
    fill(made, CONFIG, lambda name: torch.from_numpy(weights[name].decode()))
    return made


def executor_of(bundle: Bundle) -> OnnxExecutor:
    return OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=64, threads=1)


@dataclass
class Fed:
    """An executor that has been fed a batch of sequences at once, with what it said of every token."""

    executor: OnnxExecutor
    state: State
    logits_BSV: np.ndarray
    trunk_BSD: np.ndarray

    def think(self, at: Sequence[Sequence[int]], **options: Any) -> Thought:
        """About given positions of each sequence."""
        at_BQ = np.array(at)
        return self.executor.think(self.trunk(at_BQ), self.state, at_BQ=at_BQ, **options)

    def trunk(self, at_BQ: np.ndarray) -> np.ndarray:
        return np.take_along_axis(self.trunk_BSD, at_BQ[..., None], 1)


def feed(executor: OnnxExecutor, lengths: Sequence[int] = (LENGTH,), first: int = 0) -> Fed:
    """Sequence b has tokens from number 20 * (first + b) on."""
    tokens_BS = np.zeros((len(lengths), max(lengths)), np.int64)
    for b, length in enumerate(lengths):
        start = 20 * (first + b)
        tokens_BS[b, :length] = IDS[start : start + length]
    state, every = executor.new_state(len(lengths)), np.arange(max(lengths))[None].repeat(len(lengths), 0)
    logits_BSV = executor.step(tokens_BS, state, logits_at_BQ=every, lengths_B=np.array(lengths))
    return Fed(executor, state, logits_BSV, executor.trunk)


def contents(state: State) -> list[bytes]:
    """All that a state holds."""
    return [state.lengths_B.tobytes(), *(buffer.array.tobytes() for buffer in state.buffers)]


def close(ours: np.ndarray, wanted: np.ndarray, part: float) -> None:
    assert ours.dtype == np.float32 and ours.shape == wanted.shape and np.isfinite(ours).all()
    assert np.abs(ours - wanted).max() <= part * np.abs(wanted).max()


def check(ours: Thought, wanted: Thought, part: float) -> None:
    """Thoughts have the same tokens, and come to the same."""
    assert ours.tokens.tolist() == wanted.tokens.tolist() and ours.tokens.dtype == np.int64
    close(ours.logits, wanted.logits, part)
    close(ours.weight, wanted.weight, part)


def test_thoughts_matter(executor):
    fed = feed(executor)
    thought = fed.think([range(LENGTH)])
    assert thought.logits.shape == (1, LENGTH, CONFIG.vocab_size) and thought.tokens.shape == (1, LENGTH, STEPS - 2)
    assert np.abs(thought.weight).min() > 1e-3 and np.ptp(thought.weight) > 0.1
    assert len(np.unique(thought.tokens)) > LENGTH / 2
    assert np.abs(thought.logits - fed.logits_BSV).max() > 0.1 * np.abs(fed.logits_BSV).max()


@pytest.mark.parametrize("lengths", [[LENGTH], UNEQUAL])
def test_unrolled_equals_looped(executor, lengths):
    fed = feed(executor, lengths)
    at = [range(LENGTH)] if len(lengths) == 1 else [[length - 1, 0] for length in lengths]
    check(fed.think(at), fed.think(at, looped=True), SAME)


@pytest.mark.parametrize("steps", range(1, STEPS + 1))
def test_any_number_of_steps_equals_the_definition(executor, head, monkeypatch, steps):
    """Fewer than were exported are looped."""
    if steps < STEPS:
        monkeypatch.setattr(Thinker, "_unrolled", None)
    fed, at_BQ = feed(executor, [LENGTH] * 2), np.arange(LENGTH)[None].repeat(2, 0)
    latent = torch.from_numpy(fed.state.held(CONFIG.num_layers, "latent"))
    with torch.no_grad():
        wanted = head.think(torch.from_numpy(fed.trunk_BSD), torch.from_numpy(at_BQ), latent, steps=steps)
    tokens = np.zeros((2, LENGTH, 0)) if wanted.tokens is None else wanted.tokens.numpy()
    check(fed.think(at_BQ, steps=steps), Thought(wanted.logits.numpy(), wanted.weight.numpy(), tokens), REGROUPED)


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("steps", [0, STEPS + 1, -1])
def test_a_number_of_steps_that_cannot_be(executor, steps, looped):
    fed = feed(executor)
    with pytest.raises(BadInput, match=f"a thought of {steps} steps cannot be had") as raised:
        fed.think([[3]], steps=steps, looped=looped)
    assert f"for 1 to {STEPS}" in str(raised.value) and "--think-steps K" in str(raised.value)


@pytest.mark.parametrize("options", [{}, {"looped": True}, {"steps": 1}], ids=str)
def test_positions_side_by_side_equal_one_at_a_time(executor, options):
    fed = feed(executor)
    at = [11, 0, 5, 5, 2]
    together = fed.think([at], **options)
    for q, position in enumerate(at):
        alone = fed.think([[position]], **options)
        part = Thought(together.logits[:, [q]], together.weight[:, [q]], together.tokens[:, [q]])
        check(part, alone, REGROUPED)


@pytest.mark.parametrize("position", [0, 4, LENGTH - 1])
def test_what_comes_later_does_not_matter(executor, position):
    """A thought is the same when the sequence has gone on."""
    then = feed(executor, [position + 1]).think([[position]])
    check(feed(executor).think([[position]]), then, REGROUPED)


@pytest.mark.parametrize("looped", [False, True])
def test_batch_equals_each_alone(executor, looped):
    fed, last = feed(executor, UNEQUAL), np.array(UNEQUAL)[:, None] - 1
    # Where no position is given, each sequence's last one is thought about.
    together = executor.think(fed.trunk(last), fed.state, looped=looped)
    for b, length in enumerate(UNEQUAL):
        alone = feed(executor, [length], first=b).think([[length - 1]], looped=looped)
        check(Thought(together.logits[[b]], together.weight[[b]], together.tokens[[b]]), alone, REGROUPED)


@pytest.mark.parametrize("lengths", [[LENGTH], UNEQUAL])
@pytest.mark.parametrize("options", [{}, {"looped": True}, {"steps": 1}], ids=str)
def test_a_thought_leaves_nothing_behind(executor, lengths, options):
    fed = feed(executor, lengths)
    before, trunk = contents(fed.state), executor.trunk.copy()
    fed.think([[length - 1, 0] for length in lengths], **options)
    assert contents(fed.state) == before and (executor.trunk == trunk).all()
    following = np.zeros((len(lengths), 1), np.int64)
    logits = executor.step(following, fed.state, logits_at_BQ=following)
    other = feed(executor, lengths).state
    assert (logits == executor.step(following, other, logits_at_BQ=following)).all()
    assert contents(fed.state) == contents(other)


@dataclass
class Forced:
    """Picks tokens that are given, step by step, whatever the logits."""

    tokens: list[list[int]]

    def pick(self, logits_BV: np.ndarray) -> np.ndarray:
        return np.array(self.tokens.pop(0))


def told(executor: OnnxExecutor, monkeypatch, sampler: Any, pausing: Pausing | None) -> tuple[list[Event], State]:
    """What is generated after prompts of unequal lengths, and the state that is left."""
    made, new_state = [], OnnxExecutor.new_state
    monkeypatch.setattr(executor, "new_state", lambda batch: made.append(new_state(executor, batch)) or made[-1])
    prompts = [IDS[20 * b : 20 * b + length].tolist() for b, length in enumerate(UNEQUAL)]
    events = generate(executor, prompts, max_new_tokens=8, sampler=sampler, chunk=4, pausing=pausing)
    return list(events), made[0]


def plain_entropies(executor: OnnxExecutor) -> np.ndarray:
    """Of what the model says of some tokens."""
    logits_SV = feed(executor).logits_BSV[0].astype(np.float64)
    p_SV = np.exp(logits_SV) / np.exp(logits_SV).sum(-1, keepdims=True)
    return -(p_SV * np.log(p_SV)).sum(-1)


@pytest.mark.parametrize("when", ["off", "auto", "always", "looped"])
def test_pauses_leave_the_state_of_a_model_that_did_not_pause(executor, monkeypatch, when):
    pausing = {
        "off": None,
        "auto": Pausing(threshold=float(np.median(plain_entropies(executor)))),
        "always": Pausing(always=True),
        "looped": Pausing(2, always=True),
    }[when]
    events, state = told(executor, monkeypatch, Sampler(Sampling()), pausing)
    count = sum(pause is not None for event in events for pause in event.pauses_B)
    total = len(events) * len(UNEQUAL)
    assert total == 24 and (0 < count < total if when == "auto" else count == (0 if when == "off" else total))
    tokens = [list(event.tokens_B) for event in events]
    again, other = told(executor, monkeypatch, Forced(tokens.copy()), None)
    assert [list(event.tokens_B) for event in again] == tokens
    assert contents(state) == contents(other)


def test_thoughts_change_what_is_said(executor, monkeypatch):
    said = [told(executor, monkeypatch, Sampler(Sampling()), p)[0] for p in (None, Pausing(always=True))]
    assert [event.tokens_B for event in said[0]] != [event.tokens_B for event in said[1]]


def test_a_bundle_that_thinks(bundle):
    assert {path.name for path in bundle.folder.glob("think*.onnx")} == {
        *("think.onnx", "think_step.onnx", "think_mix.onnx"),
        *("think.cpu.onnx", "think_step.cpu.onnx", "think_mix.cpu.onnx"),
    }
    assert bundle.manifest["thinking"] == {"steps": STEPS, "confidence": "entropy", "threshold": 1.0}
    assert bundle.manifest["audit"]["skipped"] == 0


def test_a_bundle_whose_thoughts_were_left_out(bundle, unthinking):
    assert not list(unthinking.folder.glob("think*"))
    assert unthinking.manifest["thinking"] is None and unthinking.manifest["chosen"]["think_steps"] == 0
    assert not unthinking.config.thinks and Bundle.open(unthinking.folder).config == unthinking.config
    skipped = unthinking.manifest["audit"]["skipped_tensors"]
    assert len(skipped) > 10 and all(name.startswith("model.reasoning.") for name in skipped)
    said = f"{len(skipped)} skipped ({len(skipped)} reasoning layers, left out with --think-steps 0)"
    assert unthinking.manifest["audit"]["summary"].endswith(said)
    used = bundle.manifest["audit"]["used"]
    assert unthinking.manifest["audit"]["used"] == used - len(skipped)


def test_no_thoughts_no_state(unthinking):
    runner = executor_of(unthinking)
    fed = feed(runner)
    assert len(fed.state.layers) == CONFIG.num_layers and runner.trunk is None
    with pytest.raises(BadInput, match="exported without reasoning layers") as raised:
        runner.think(np.zeros((1, 1, CONFIG.hidden_size), np.float32), fed.state)
    assert "leave --think out" in str(raised.value)
    with pytest.raises(BadInput, match="no reasoning layers"):
        api.run(unthinking.folder, prompt="a", think="auto")
    assert api.run(unthinking.folder, prompt="a", think="off", max_new_tokens=1).pauses == ()


def test_plain_logits_are_those_of_a_model_without_thoughts(bundle, unthinking, tiny_bundle):
    """Bit for bit: left out with ``--think-steps 0``, and of a checkpoint that never had any."""
    for lengths in ([LENGTH], UNEQUAL):
        thinking, *others = (feed(executor_of(one), lengths) for one in (bundle, unthinking, tiny_bundle("fp32")))
        for other in others:
            for b, length in enumerate(lengths):
                assert thinking.logits_BSV[b, :length].tobytes() == other.logits_BSV[b, :length].tobytes()
            assert contents(other.state) == contents(thinking.state)[:-1]
