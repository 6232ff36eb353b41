"""Thoughts of exported graphs through onnxruntime: equal to the definition's, and without a trace in the state.

They are compared with the literal model, too, on the graphs' own hidden states; ``test_thoughts.py`` has those of
transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import LIMIT, check
from literal_thoughts import numbers_of, think
from runners import OnnxRunner, TorchRunner, run_batch, run_one
from test_engram import PAPER_FORM
from test_thoughts import Said, ThinkingRunner, check_thoughts
from traced import export_bundle

from v4export import presets
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig, Reasoning
from v4export.graphs.export import PORTABLE, graphs_in
from v4export.model.load import load_transformer
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow

CHUNKS, SINGLES = (1, 5, 14), 4
LENGTH = sum(CHUNKS) + SINGLES
UNEQUAL = (13, 4, 9)
LAST = "reasoning.talk_head.4.weight"

LIKE_THE_MODEL = Reasoning(layers=2, steps=3)
OTHER_SIZES = Reasoning(
    layers=1, steps=3, num_heads=3, q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=12,
    v_head_dim=14, intermediate_size=56,
)  # fmt: skip


def first_layers(preset: str, count: int, **changes: object) -> ModelConfig:
    """The beginning of a preset as a model of its own."""
    return replace(presets.load(preset).first_layers(count), left_out_layers=0, **changes)


CONFIGS = {
    "v3": first_layers("tiny-v3", 1, moe_layers=(), reasoning=LIKE_THE_MODEL),
    "v3.2, engram with a convolution": first_layers(
        "tiny-v3.2", 1, engram=replace(PAPER_FORM, layers=(0,)), reasoning=replace(OTHER_SIZES, steps=2)
    ),
    "v4": first_layers("tiny-v4", 2, reasoning=OTHER_SIZES),
    "v4.1": first_layers("tiny-v4.1", 3, reasoning=OTHER_SIZES),
}


class GraphRunner(OnnxRunner):
    """As ``ThinkingRunner``, over graphs; no thought may change what is held, by a single bit.

    Attributes:
        plain: logits of the last step without thoughts.
        trunk: what its thoughts started from.
    """

    plain: np.ndarray
    trunk: np.ndarray

    def __init__(self, executor: OnnxExecutor, batch: int = 1, looped: bool = False, steps: int | None = None) -> None:
        super().__init__(executor, batch)
        self.how = {"looped": looped, "steps": steps}

    def step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        before_B = self.state.lengths_B
        self.plain = super().step(tokens_BS, lengths_B)
        assert self.executor.trunk is not None
        self.trunk = self.executor.trunk
        last_B = np.maximum(self.state.lengths_B - 1, 0)
        at_BQ = np.minimum(before_B[:, None] + np.arange(tokens_BS.shape[1]), last_B[:, None])
        with unchanged(self):
            out = self.executor.think(self.trunk, self.state, at_BQ=at_BQ, **self.how)
        return np.concatenate([out.logits, out.weight[..., None], out.tokens], -1)


def held(runner: OnnxRunner | TorchRunner) -> list[bytes]:
    """Every buffer of a state, whatever can be seen of it."""
    return [buffer.array.tobytes() for buffer in runner.state.buffers]


@contextmanager
def unchanged(runner: OnnxRunner) -> Iterator[None]:
    """Nothing of a state changes meanwhile."""
    before, lengths = held(runner), runner.state.lengths_B.tolist()
    yield
    assert held(runner) == before and runner.state.lengths_B.tolist() == lengths


@dataclass
class Exported:
    """A checkpoint, its graphs, and the definition with its weights."""

    hub: Path
    bundle: Bundle

    def __post_init__(self) -> None:
        self.config, self.executor = self.bundle.config, cache(self._executor)
        self.vocab_size = self.config.vocab_size

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: torch.from_numpy(w.decode()) for n, w in audit(Checkpoint.open(self.hub)).weights.items()}

    @cached_property
    def definition(self) -> torch.nn.Module:
        return load_transformer(self.config, lambda name: self.weights[name])

    def _executor(self, bodies: bool = False) -> OnnxExecutor:
        b = self.bundle
        return OnnxExecutor(b.folder, b.config, b.precision, max_seq_len=b.max_seq_len, threads=1, bodies=bodies)

    def torch_runner(self, batch: int = 1) -> ThinkingRunner:
        return ThinkingRunner(self.definition, batch, self.executor()._lookup)

    def ids(self, length: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(3, 256, length)

    def said(self, side_by_side: np.ndarray) -> Said:
        return Said.of(side_by_side, self.vocab_size)

    @cached_property
    def expected(self) -> Said:
        """By the definition, all positions in parallel."""
        runner = self.torch_runner()
        said = self.said(run_one(runner, self.ids(LENGTH), (LENGTH,), 0))
        assert np.median(np.abs(runner.plain[0] - said.logits).max(-1)) > 0.1, "thoughts must make a difference"
        return said


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """From a name of ``CONFIGS`` and a precision: graphs, on request with a talk head that gives thoughts no weight."""
    folder = tmp_path_factory.mktemp("thoughts")

    @cache
    def hub(name: str, silent: bool) -> Path:
        if not silent:
            return synth(CONFIGS[name], folder / name / "hub")
        copy = shutil.copytree(hub(name, False), folder / name / "silent")
        write_zeros(copy / "model.safetensors", LAST)
        return Path(copy)

    @cache
    def make(name: str, precision: str = "fp32", silent: bool = False, **options: int) -> Exported:
        out = folder / name / f"{precision} {silent} {options}"
        return Exported(hub(name, silent), export_bundle(hub(name, silent), out, precision, **options))

    return make


def write_zeros(file: Path, ending: str) -> None:
    """In place of a tensor of a checkpoint."""
    data = np.memmap(file, np.uint8, "r+")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    (entry,) = (e for name, e in json.loads(data[8:start].tobytes()).items() if name.endswith(ending))
    first, end = entry["data_offsets"]
    assert data[start + first : start + end].any()
    data[start + first : start + end] = 0


def check_same(ours: Said, theirs: Said) -> None:
    """Tokens are equal, logits and weights within the limit."""
    assert (ours.tokens == theirs.tokens).all()
    check(ours.logits, theirs.logits)
    assert np.abs(ours.weight - theirs.weight).max() <= LIMIT * np.abs(theirs.weight).max()


@pytest.mark.parametrize("looped", [False, True], ids=["unrolled", "looped"])
@pytest.mark.parametrize("bodies", [False, True], ids=["fast", "bodies"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_definition(exported: Callable[..., Exported], name: str, bodies: bool, looped: bool) -> None:
    case = exported(name)
    runner = GraphRunner(case.executor(bodies), looped=looped)
    check_same(case.said(run_one(runner, case.ids(LENGTH), CHUNKS, SINGLES)), case.expected)
    sequences = [case.ids(length, seed) for seed, length in enumerate(UNEQUAL)]
    batch = GraphRunner(case.executor(bodies), len(sequences), looped)
    wanted = run_batch(case.torch_runner(len(sequences)), sequences, 5)
    for ours, theirs in zip(run_batch(batch, sequences, 5), wanted, strict=True):
        check_same(case.said(ours), case.said(theirs))


@pytest.mark.parametrize("bodies", [False, True], ids=["fast", "bodies"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_literal_model(exported: Callable[..., Exported], name: str, bodies: bool) -> None:
    case = exported(name)
    for looped in (False, True):
        runner = GraphRunner(case.executor(bodies), looped=looped)
        ours = case.said(run_one(runner, case.ids(LENGTH), (LENGTH,), 0))
        check_thoughts(ours, think(torch.from_numpy(runner.trunk[0]), case.weights, numbers_of(case.config)))


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps(exported: Callable[..., Exported], steps: int) -> None:
    case, ids = exported("v3"), exported("v3").ids(LENGTH)
    runner, lengths = case.torch_runner(), np.array([LENGTH])
    out = runner.plain_step(ids[None], lengths)
    wanted = runner.think(out.trunk, np.arange(LENGTH)[None], steps)
    ours = GraphRunner(case.executor(), steps=steps).step(ids[None], lengths)
    check_same(case.said(ours[0]), case.said(wanted[0]))


def plain_logits(runner: OnnxRunner, ids: np.ndarray) -> Iterator[np.ndarray]:
    """Of each step, without thoughts, though the runner may have them."""
    at = 0
    for size in (*CHUNKS, *[1] * SINGLES):
        logits = runner.step(ids[None, at : at + size], np.array([size]))
        yield runner.plain if isinstance(runner, GraphRunner) else logits
        at += size


def check_nothing_is_left_behind(case: Exported, bodies: bool = False) -> None:
    thinking, silent = (kind(case.executor(bodies), 1) for kind in (GraphRunner, OnnxRunner))
    for one, other in zip(*(plain_logits(r, case.ids(LENGTH)) for r in (thinking, silent)), strict=True):
        assert np.array_equal(one, other)
        assert held(thinking) == held(silent)


@pytest.mark.parametrize("bodies", [False, True], ids=["fast", "bodies"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_left_behind(exported: Callable[..., Exported], name: str, bodies: bool) -> None:
    """Who has thought goes on as though he had not."""
    check_nothing_is_left_behind(exported(name), bodies)


def check_without_weight(case: Exported, runner: GraphRunner | ThinkingRunner) -> None:
    """Thoughts come to the plain logits, bit for bit."""
    ids, at = case.ids(LENGTH), 0
    for size in (*CHUNKS, *[1] * SINGLES):
        said = case.said(runner.step(ids[None, at : at + size], np.array([size]))[0])
        assert not said.weight.any() and np.array_equal(said.logits, runner.plain[0])
        at += size


@pytest.mark.parametrize("name", CONFIGS)
def test_without_weight_a_thought_changes_nothing(exported: Callable[..., Exported], name: str) -> None:
    case = exported(name, silent=True)
    check_without_weight(case, case.torch_runner())
    for bodies in (False, True):
        for looped in (False, True):
            check_without_weight(case, GraphRunner(case.executor(bodies), looped=looped))


def test_bfloat16(exported: Callable[..., Exported]) -> None:
    """The same, and so does a model whose reasoning layers were left out."""
    case = exported("v3", "bf16", silent=True)
    for bodies in (False, True):
        check_nothing_is_left_behind(case, bodies)
        for looped in (False, True):
            check_without_weight(case, GraphRunner(case.executor(bodies), looped=looped))
        without = exported("v3", "bf16", silent=True, think_steps=0)
        assert graphs_in(without.bundle.folder) == [PORTABLE] and without.executor().trunk is None
        runners = [OnnxRunner(one.executor(bodies), 1) for one in (case, without)]
        for one, other in zip(*(plain_logits(r, case.ids(LENGTH)) for r in runners), strict=True):
            assert np.array_equal(one, other)
            own = held(runners[1])
            assert held(runners[0])[: len(own)] == own
