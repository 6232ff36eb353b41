"""Speculative decoding: what is drafted changes how many steps there are, and no token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hashed_model import VOCAB, hashed_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from played_tensorrt import TensorRT, engine_executor, played_cuda_graphs, with_engines
from small_models import small
from traced import export_bundle

from v4export import show
from v4export.checkpoint.synth import synth
from v4export.errors import BadInput
from v4export.package.bundle import Bundle
from v4export.runtime.drafting import Drafter, Drafting
from v4export.runtime.generate import Generation, Timings, generate
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.sampling import Sampler, Sampling


@dataclass
class Tokens:
    """A state: the tokens of each row, and those of a step that is not committed."""

    rows: list[list[int]]
    fed: np.ndarray | None = None

    def commit(self, counts_B: np.ndarray) -> None:
        assert self.fed is not None
        for row, tokens, count in zip(self.rows, self.fed.tolist(), counts_B.tolist(), strict=True):
            row += tokens[:count]


@dataclass
class Pretender:
    """A model that is a hash of every token so far, and a layer that drafts ``right`` of a hundred times what it says.

    A feature of a token is how many tokens there are up to it, so that features of other tokens would be noticed.
    """

    right: int
    max_seq_len: int = 200
    tail: None = None
    trunk: None = None
    features: np.ndarray | None = None
    steps: list[list[int]] = field(default_factory=list)

    def new_state(self, batch: int = 1) -> Tokens:
        return Tokens([[] for _ in range(batch)])

    new_draft_state = new_state

    def step(self, tokens_BS, state, *, logits_at_BQ, lengths_B=None, coming=None, commit=True) -> np.ndarray:
        counts_B = np.full(len(tokens_BS), tokens_BS.shape[1]) if lengths_B is None else lengths_B
        before_B = np.array([len(row) for row in state.rows])
        assert (before_B + counts_B <= self.max_seq_len).all()
        self.features = (before_B[:, None] + 1 + np.arange(tokens_BS.shape[1]))[..., None].astype(np.float32)
        logits = np.full((*logits_at_BQ.shape, VOCAB), np.nan, np.float32)
        for b, q in np.argwhere(logits_at_BQ < counts_B[:, None]).tolist():
            logits[b, q] = hashed_logits(state.rows[b] + tokens_BS[b, : logits_at_BQ[b, q] + 1].tolist())
        state.fed = tokens_BS.copy()
        self.steps.append(counts_B.tolist())
        if commit:
            state.commit(counts_B)
        return logits

    def draft(self, tokens_BS, features, state, *, logits_at_BQ, lengths_B, commit=True) -> tuple[Any, Any]:
        before_B = np.array([len(row) for row in state.rows])
        for b, length in enumerate(lengths_B.tolist()):
            assert features[b, :length, 0].tolist() == list(range(before_B[b] + 1, before_B[b] + length + 1))
        logits = np.full((*logits_at_BQ.shape, VOCAB), np.nan, np.float32)
        for b, q in np.argwhere(logits_at_BQ < lengths_B[:, None]).tolist():
            # The layer knows of every token but the first, which no token follows.
            known = [FIRST, *state.rows[b], *tokens_BS[b, : logits_at_BQ[b, q] + 1].tolist()]
            logits[b, q] = hashed_logits(known)
            if hash(tuple(known)) % 100 >= self.right:
                logits[b, q] = -logits[b, q]
        state.fed = tokens_BS.copy()
        if commit:
            state.commit(lengths_B)
        return logits, features + 1


FIRST = 5
PROMPTS = st.lists(
    st.lists(st.integers(0, VOCAB - 1), max_size=20).map(lambda row: [FIRST, *row]), min_size=1, max_size=4
)


def tokens_of(executor: Any, prompts: Any, drafting: Drafting | None = None, **options: Any) -> tuple[list, list]:
    how = {"max_new_tokens": 30, "sampler": Sampler(Sampling()), **options}
    events = list(generate(executor, prompts, drafting=drafting, **how))
    assert [event.step for event in events] == list(range(len(events)))
    rows = [[e.tokens_B[b] for e in events if e.tokens_B[b] is not None] for b in range(len(prompts))]
    return rows, list(events[-1].finished_B)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(1, 6), st.integers(0, 100), st.integers(1, 25), st.integers(1, 40), st.integers(1, 60))
def test_no_token_changes(prompts, most, right, chunk, new, room):
    stops = frozenset(range(4))
    how = {"max_new_tokens": new, "chunk": chunk, "stop_ids": stops}
    longest = max(map(len, prompts)) + room
    wanted = tokens_of(Pretender(0, longest), prompts, **how)
    drafting = Drafting(most)
    assert tokens_of(Pretender(right, longest), prompts, drafting, **how) == wanted
    assert 0 <= drafting.accepted <= drafting.drafted


@pytest.mark.parametrize(("right", "steps"), [(100, 1 + 6), (0, 1 + 23)])
def test_steps_that_are_saved(right, steps):
    """Of a prompt and 24 tokens: with three right drafts, a step gives four of them, but for the first."""
    executor, drafting = Pretender(right), Drafting(3)
    tokens_of(executor, [[FIRST, 1, 2]], drafting, max_new_tokens=24)
    assert len(executor.steps) == steps
    assert (drafting.accepted == drafting.drafted) == (right == 100) and (drafting.accepted > 0) == (right == 100)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(1, 5), st.integers(0, 9))
def test_sampling_draws_the_same(right, most, seed):
    """One number is drawn for each token that comes, so a row alone gets what it gets without drafts."""
    how = {"prompts": [[FIRST, 3]], "chunk": 8}
    plain, drafted = (
        tokens_of(Pretender(right), drafting=drafting, sampler=Sampler(Sampling(0.7, seed=seed)), **how)
        for drafting in (None, Drafting(most))
    )
    assert plain == drafted


def test_what_is_asked_for():
    assert Drafting.of(None, True) == Drafting(1) and Drafting.of(4, True) == Drafting(4)
    assert Drafting.of(0, True) is Drafting.of(None, False) is Drafting.of(0, False) is None
    with pytest.raises(BadInput, match="no draft graph"):
        Drafting.of(2, False)


def test_what_is_told_of_a_run():
    timings = Timings(1.0, 2.0, 3.0, 4.0, 1.0)
    plain = Generation("x", (1, 2), 3, "length", timings)
    assert show.timings(plain) == "[3 prompt tokens, 3/s; 2 new, 4.0/s; length]"
    drafted = show.timings(replace(plain, drafted=8, accepted=2))
    assert drafted == "[3 prompt tokens, 3/s; 2 new, 4.0/s, 2 of 8 drafts accepted (25%); length]"


def test_rows_move_between_drafters():
    """What a row was told goes with it."""
    executor = Pretender(100)
    one, many = Drafter(executor, 1), Drafter(executor, 3)
    one.give(0, [7, 8], np.array([[1.0], [2.0]]))
    one.give(0, [9], np.array([[3.0]]))

    class Putting(Tokens):
        def put(self, b: int, other: Tokens) -> None:
            self.rows[b] = list(other.rows[0])

    many._state = Putting(many._state.rows)
    many.put(2, one)
    found = many.propose([2, 2, 2])
    assert found[:2] == [[], []] and found[2][0] == int(hashed_logits([FIRST, 7, 8, 9]).argmax())
    assert many.propose([2, 2, 2]) == [[], [], []]


#: Growing rows, index keys, and rings, entries and open ones.
MODELS = ("tiny-v3", "tiny-v3.2", "tiny-v4")
#: Shorter than a ring, longer than one, and across the first capacity's 256 rows, in the prompt and while decoding.
LENGTHS = (5, 70, 290, 245)
NEW = 130


@dataclass(frozen=True)
class Case:
    """A model that drafts, and what it says without drafts."""

    bundle: Bundle
    executor: OnnxExecutor
    prompts: list[list[int]]
    plain: list[list[int]]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            made[name] = exported(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


def exported(name: str, folder: Path) -> Case:
    config = replace(small(name), num_mtp_layers=1, drafts=True)
    bundle = export_bundle(synth(config, folder / "hub"), folder / "out", "fp32", draft=True)
    how = {"max_seq_len": bundle.max_seq_len, "threads": 1}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, config.vocab_size, length).tolist() for length in LENGTHS]
    plain = [tokens_of(executor, [one], max_new_tokens=NEW)[0][0] for one in prompts]
    return Case(bundle, executor, prompts, plain)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_same_tokens(case, name, most):
    """Random layers draft badly: nearly every step has tokens that it must leave no trace of."""
    one = case(name)
    for prompts, wanted in [
        *(([p], [t]) for p, t in zip(one.prompts, one.plain, strict=True)),
        (one.prompts, one.plain),
    ]:
        drafting = Drafting(most)
        found, _ = tokens_of(one.executor, prompts, drafting, max_new_tokens=NEW, chunk=48)
        assert found == wanted
        assert drafting.accepted < drafting.drafted / 10


class Oracle(OnnxExecutor):
    """Drafts what is going to be said, or at some places something else, by a layer that runs all the same."""

    plain: list[list[int]]
    prompts: list[list[int]]
    wrong = 7

    def draft(self, tokens_BS, features, state, *, logits_at_BQ, lengths_B, commit=True):
        logits, handed = super().draft(
            tokens_BS, features, state, logits_at_BQ=logits_at_BQ, lengths_B=lengths_B, commit=commit
        )
        held_B = state.lengths_B - (lengths_B if commit else 0)
        for b, q in np.argwhere(logits_at_BQ < lengths_B[:, None]).tolist():
            # Its rows are of a prompt's tokens but the first, and of those that were said.
            said = held_B[b] + logits_at_BQ[b, q] + 2 - len(self.prompts[b])
            token = self.plain[b][said] if said < NEW else 0
            logits[b, q] = 0
            logits[b, q, token if said % self.wrong else 3] = 1
        return logits, handed


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_accepted_drafts_give_the_same_tokens(case, name):
    one = case(name)
    oracle = Oracle(one.bundle.folder, one.bundle.config, one.bundle.precision, max_seq_len=512, threads=1)
    oracle.plain, oracle.prompts = one.plain, one.prompts
    drafting = Drafting(3)
    found, _ = tokens_of(oracle, one.prompts, drafting, max_new_tokens=NEW)
    assert found == one.plain
    assert drafting.accepted > 0.6 * drafting.drafted


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_engines_give_the_same_tokens(case, name):
    one, trt = case(name), TensorRT()
    with played_cuda_graphs(trt):
        engine = engine_executor(trt, with_engines(one.bundle, max_chunk=48))
        for prompts, wanted in ((one.prompts[:1], one.plain[:1]), (one.prompts, one.plain)):
            found, _ = tokens_of(engine, prompts, Drafting(3), max_new_tokens=NEW, chunk=64)
            assert found == wanted


@pytest.mark.slow
def test_an_engine_of_few_tokens_cannot_check_many(case):
    one, trt = case("tiny-v3"), TensorRT()
    with played_cuda_graphs(trt):
        engine = engine_executor(trt, with_engines(one.bundle, max_chunk=3))
        with pytest.raises(BadInput, match="at most 3"):
            tokens_of(engine, one.prompts[:1], Drafting(3))
