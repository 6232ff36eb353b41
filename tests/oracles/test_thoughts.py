"""Reasoning layers against a literal float64 implementation, on hidden states that transformers computes.

Of DeepSeek-V4.1, which transformers does not have, the hidden states are the definition's own, and its logits are
checked against those of the literal model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import literal_thoughts
import literal_v41
import numpy as np
import pytest
import torch
import torch_state
from checks import LIMIT, check, random_ids
from hub_models import canonical_weights, hub_config, hub_logits, hub_model, yarn
from literal_thoughts import Numbers, Thoughts, numbers_of, think
from runners import Lookup, TorchRunner, run_batch, run_one
from test_engram import PAPER_FORM, Remembering
from v41_models import pair

from v4export.checkpoint.aliases import canonical
from v4export.config import ModelConfig, Reasoning
from v4export.model import Transformer
from v4export.model.load import load_transformer

pytestmark = pytest.mark.slow

CHUNKS, SINGLES = (1, 5, 22), 8
LENGTH = sum(CHUNKS) + SINGLES
UNEQUAL = (23, 6, 15)
#: Tokens chosen by less, as a part of the largest logit, may be others in float32; few thoughts have one.
NEAR_TIE = 1e-4

#: About which thoughts are compared with wrong ones: few, to be fast.
POSITIONS = (0, 9, 30)

LIKE_THE_MODEL = Reasoning(layers=2, steps=4)
OTHER_SIZES = Reasoning(
    layers=2, steps=4, num_heads=3, q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=12,
    v_head_dim=14, intermediate_size=56,
)  # fmt: skip


@dataclass
class Model:
    """A model that can think, and where its last hidden states come from.

    Attributes:
        config: with reasoning layers.
        weights: of the whole model by name.
        trunk: token ids to hidden states [n, D], after all layers and before the final norm.
        plain: token ids to logits [n, V] without a thought, from elsewhere.
        lookup: of Engram.
    """

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    trunk: Callable[[np.ndarray], torch.Tensor]
    plain: Callable[[np.ndarray], np.ndarray]
    lookup: Lookup | None = None

    def loaded(self, absorbed: bool = True, **changes: Any) -> Transformer:
        """The definition; ``changes`` are weights."""
        weights = self.weights | changes
        return load_transformer(self.config, lambda name: weights[name], absorbed=absorbed)

    def without(self, reasoning: Reasoning | None) -> Transformer:
        """The definition with its reasoning layers left out, or without any."""
        return load_transformer(replace(self.config, reasoning=reasoning), lambda name: self.weights[name])

    @cached_property
    def numbers(self) -> Numbers:
        return numbers_of(self.config)

    @cached_property
    def expected(self) -> Thoughts:
        """Of the sequence that most tests go by."""
        return self.literal(random_ids(LENGTH))

    @cached_property
    def computed(self) -> Said:
        """The same by the definition, all positions in parallel."""
        return said(self.runner(), LENGTH)

    def literal(self, ids: np.ndarray, **changes: Any) -> Thoughts:
        """The literal model's thoughts about every token."""
        return think(self.trunk(ids), self.weights, replace(self.numbers, **changes))

    def runner(self, batch: int = 1, **options: Any) -> ThinkingRunner:
        """A runner over an empty state."""
        return ThinkingRunner(self.loaded(**options), batch, self.lookup)


class ThinkingRunner(TorchRunner):
    """Thinks about every token of a step once its rows are held; gives logits, weights and tokens side by side.

    Attributes:
        each: whether positions are thought about one by one.
        plain: logits of the last step without thoughts.
    """

    each = False
    plain: np.ndarray

    def step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        S, before_B = tokens_BS.shape[1], self.state.lengths_B
        out = self.plain_step(tokens_BS, lengths_B)
        self.plain = out.logits.numpy()
        # What is padded on the right is thought about, too, as though it were the last token, and ignored.
        last_B = np.maximum(self.state.lengths_B - 1, 0)
        at_BQ = np.minimum(before_B[:, None] + np.arange(S), last_B[:, None])
        parts = [slice(q, q + 1) for q in range(S)] if self.each else [slice(S)]
        return np.concatenate([self.think(out.trunk[:, part], at_BQ[:, part]) for part in parts], 1)

    def think(self, trunk_BQD: torch.Tensor, at_BQ: np.ndarray, steps: int | None = None) -> np.ndarray:
        """[B, Q, V + 1 + K - 2]."""
        with torch.no_grad():
            out = self.model.think(trunk_BQD, torch.from_numpy(at_BQ), self._held(), steps)
        tokens = [] if out.tokens is None else [out.tokens.to(out.logits.dtype)]
        return torch.cat([out.logits, out.weight[..., None], *tokens], -1).numpy()

    def _held(self) -> list[dict[str, torch.Tensor]]:
        return [
            {name: torch_state.held(self.state.held(i, name)) for name in buffers}
            for i, buffers in enumerate(self.state.layers)
        ]

    def plain_step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> Any:
        """The model's own step, its rows put in their places."""
        every = torch.arange(tokens_BS.shape[1]).expand(*tokens_BS.shape)
        with torch.no_grad():
            *given, found = self._given(tokens_BS, lengths_B)
            out = self.model(*given, every, found, torch.from_numpy(self.state.decoder_start_B))
        self._put(out.rows)
        self.state.commit(lengths_B)
        return out


@dataclass(frozen=True)
class Said:
    """What a runner gave of one sequence: logits [n, V], weights [n], tokens [n, K - 2]."""

    logits: np.ndarray
    weight: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, side_by_side: np.ndarray, vocab_size: int = 97) -> Said:
        logits, weight, tokens = np.split(side_by_side, [vocab_size, vocab_size + 1], 1)
        return cls(logits, weight[:, 0], tokens.astype(np.int64))

    @classmethod
    def literal(cls, thoughts: Thoughts) -> Said:
        return cls(thoughts.logits.numpy(), thoughts.weight.numpy(), np.array(thoughts.tokens, np.int64))


def said(runner: ThinkingRunner, length: int) -> Said:
    """Of a sequence given at once."""
    return Said.of(run_one(runner, random_ids(length), (length,), 0))


def check_thoughts(ours: Said, theirs: Thoughts) -> None:
    """Tokens are equal, logits and weights within the limit, but for the few thoughts that near ties may turn."""
    sure, true = theirs.sure(NEAR_TIE).numpy(), Said.literal(theirs)
    assert sure.mean() > 0.9
    assert (ours.tokens[sure] == true.tokens[sure]).all()
    check(ours.logits[sure], true.logits[sure])
    scale = np.abs(true.weight).max()
    assert scale > 0.3, "weights too small to mean anything"
    assert np.abs(ours.weight - true.weight)[sure].max() <= LIMIT * scale


def _thinking(
    plain: ModelConfig,
    weights: dict[str, torch.Tensor],
    reasoning: Reasoning,
    trunk: Callable[[np.ndarray], torch.Tensor],
    logits: Callable[[np.ndarray], np.ndarray],
    lookup: Lookup | None = None,
) -> Model:
    config = replace(plain, reasoning=reasoning)
    own = literal_thoughts.random_weights(
        numbers_of(config),
        config.hidden_size,
        reasoning.q_lora_rank or config.q_lora_rank,
        reasoning.intermediate_size or config.intermediate_size,
        config.attention_bias,
    )
    return Model(config, weights | own, cache_by_content(trunk), logits, lookup)


def cache_by_content(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], Any]:
    """The function, computed once for a sequence."""
    kept = cache(lambda content: function(np.frombuffer(content, np.int64).copy()))
    return lambda ids: kept(ids.tobytes())


def _before_the_norm(hub: torch.nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """What a transformers model's final norm is given while something runs, [n, D]."""
    seen = []
    hook = hub.model.norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        run()
    finally:
        hook.remove()
    (hidden,) = seen
    return hidden[0]


def _beside_hub(family: str, reasoning: Reasoning, **changes: Any) -> Model:
    hub = hub_model(family, **changes)

    def logits(ids: np.ndarray) -> np.ndarray:
        return hub_logits(hub, torch.from_numpy(ids)[None])[0].numpy()

    def trunk(ids: np.ndarray) -> torch.Tensor:
        return _before_the_norm(hub, lambda: logits(ids))

    return _thinking(hub_config(hub), canonical_weights(hub), reasoning, trunk, logits)


def _beside_engram(family: str, reasoning: Reasoning) -> Model:
    both = Remembering(family, PAPER_FORM)
    own = {f"model.layers.{i}.engram.{n}": w for i, some in both.weights.items() for n, w in some.items()}

    def trunk(ids: np.ndarray) -> torch.Tensor:
        return _before_the_norm(both.hub, lambda: both.reference(ids))

    return _thinking(both.config, canonical_weights(both.hub) | own, reasoning, trunk, both.reference, both.lookup)


def _v41(reasoning: Reasoning, **changes: Any) -> Model:
    text = literal_v41.random_text_config(**changes)
    stored = literal_v41.random_weights(text)
    weights = {canonical(name, True): torch.as_tensor(value).float() for name, value in stored.items()}
    both = pair(**changes)

    def trunk(ids: np.ndarray) -> torch.Tensor:
        runner = model.runner()
        return runner.plain_step(ids[None], np.array([len(ids)])).trunk[0]

    model = _thinking(both.model.config, weights, reasoning, trunk, both.reference, both.lookup)
    return model


CASES: dict[str, Callable[[], Model]] = {
    "v2, queries at once": lambda: _beside_hub(
        "deepseek_v2", LIKE_THE_MODEL, q_lora_rank=None, num_hidden_layers=2, **yarn(mscale=0.707, mscale_all_dim=0.707)
    ),
    "v3, biases, yarn with both magnitudes, large eps": lambda: _beside_hub(
        "deepseek_v3", LIKE_THE_MODEL, attention_bias=True, rms_norm_eps=1e-3, **yarn(mscale=0.8, mscale_all_dim=0.4)
    ),
    "v3.2, sizes of its own": lambda: _beside_hub("deepseek_v32", OTHER_SIZES, **yarn()),
    "v4": lambda: _beside_hub("deepseek_v4", OTHER_SIZES),
    "v4.1": lambda: _v41(replace(OTHER_SIZES, layers=1)),
    "v3, engram with a convolution": lambda: _beside_engram("deepseek_v3", replace(LIKE_THE_MODEL, layers=1)),
}
V3, V4 = "v3, biases, yarn with both magnitudes, large eps", "v4"


@cache
def model_of(case: str) -> Model:
    """Made once for all tests."""
    return CASES[case]()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


def test_all_positions_in_parallel(case: Model) -> None:
    runner = case.runner()
    check_thoughts(said(runner, LENGTH), case.expected)
    check(runner.plain[0], case.plain(random_ids(LENGTH)))
    check_thoughts(said(case.runner(absorbed=False), LENGTH), case.expected)
    thought = np.abs(runner.plain[0] - case.computed.logits).max(-1)
    assert np.median(thought) > 0.1, "thoughts must make a difference"


def test_one_position_at_a_time_and_after_every_chunk(case: Model) -> None:
    runner = case.runner()
    check_thoughts(Said.of(run_one(runner, random_ids(LENGTH), CHUNKS, SINGLES)), case.expected)
    runner = case.runner()
    runner.each = True
    check_thoughts(said(runner, LENGTH), case.expected)


def test_unequal_lengths(case: Model) -> None:
    sequences = [random_ids(length, seed) for seed, length in enumerate(UNEQUAL)]
    for ids, given in zip(sequences, run_batch(case.runner(len(UNEQUAL)), sequences, 9), strict=True):
        check_thoughts(Said.of(given), case.literal(ids))


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("name", [V3, V4])
def test_other_numbers_of_steps(name: str, steps: int) -> None:
    case, ids = model_of(name), random_ids(20)
    runner = case.runner()
    out = runner.plain_step(ids[None], np.array([len(ids)]))
    given = runner.think(out.trunk, np.arange(len(ids))[None], steps)
    check_thoughts(Said.of(given[0]), case.literal(ids, steps=steps))


def test_nothing_is_left_behind(case: Model) -> None:
    """Neither thoughts nor reasoning layers change what the model itself holds and says, by a single bit."""
    ids, at = random_ids(LENGTH), 0
    thinking, silent = case.runner(), case.runner()
    assert case.config.reasoning is not None
    without = (case.without(reasoning) for reasoning in (replace(case.config.reasoning, steps=0), None))
    plain = [TorchRunner(model, 1, case.lookup) for model in without]
    for size in (*CHUNKS, *[1] * SINGLES):
        piece, lengths = ids[None, at : at + size], np.array([size])
        thinking.step(piece, lengths)
        others = [silent.plain_step(piece, lengths).logits.numpy(), *(one.step(piece, lengths) for one in plain)]
        for logits in others:
            assert np.array_equal(thinking.plain, logits)
        for other in (silent, *plain):
            for layer, buffers in enumerate(other.state.layers):
                for name, buffer in buffers.items():
                    assert np.array_equal(thinking.state.layers[layer][name].array, buffer.array)
        at += size
    assert len(thinking.state.layers) == len(silent.state.layers)
    assert all(len(one.state.layers) == case.config.num_layers for one in plain)


def test_without_weight_a_thought_changes_nothing(case: Model) -> None:
    ids, at, last = random_ids(LENGTH), 0, "model.reasoning.talk_head.4.weight"
    runner = case.runner(**{last: torch.zeros_like(case.weights[last])})
    for size in (*CHUNKS, *[1] * SINGLES):
        given = runner.step(ids[None, at : at + size], np.array([size]))
        assert np.array_equal(Said.of(given[0]).logits, runner.plain[0])
        at += size


def weights_of_a_kind() -> Iterator[str]:
    """One weight of each kind, those of the last layer."""
    reasoning = [name for name in model_of(V3).weights if name.startswith("model.reasoning.")]
    yield from (name for name in reasoning if ".layers.0." not in name)
    yield "model.reasoning.layers.0.self_attn.kv_b_proj.weight"


def test_check_would_see_a_wrong_weight() -> None:
    case, rng = model_of(V3), torch.Generator().manual_seed(0)
    names = list(weights_of_a_kind())
    assert len(names) == 2 + 5 + 12 + 3 + 1
    ids = random_ids(LENGTH)
    for name in names:
        right = case.weights[name]
        wrong = right * (1 + 0.01 * torch.randn(right.shape, generator=rng))
        _check_it_shows(case, think(case.trunk(ids), case.weights | {name: wrong}, case.numbers, POSITIONS), name)


@pytest.mark.parametrize("name", [V3, V4])
def test_check_would_see_a_wrong_constant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, ids = model_of(name), random_ids(LENGTH)
    n, c = case.numbers, case.config
    theta = c.compressed.rope_theta if c.compressed else c.rope_theta
    wrong: dict[str, dict[str, Any]] = {
        "scale": {"scale": n.scale * 1.01},
        "no yarn": {"frequencies": literal_thoughts.rotary_frequencies(n.rope, theta, None)},
        "base": {"frequencies": literal_thoughts.rotary_frequencies(n.rope, 1.01 * theta, c.yarn)},
        "magnitude": {"magnitude": n.magnitude * 1.01},
        "limit": {"limit": None if n.limit else 3.0},
        "eps": {"eps": n.eps * 3},
    }
    if name == V4:
        del wrong["eps"]  # too small to be seen
    for what, changes in wrong.items():
        _check_it_shows(case, think(case.trunk(ids), case.weights, replace(n, **changes), POSITIONS), what)
    if name == V3:
        monkeypatch.setattr(literal_thoughts, "LATENT_EPS", n.eps)
        _check_it_shows(case, think(case.trunk(ids), case.weights, n, POSITIONS), "eps of the latents")


def _check_it_shows(case: Model, wrong: Thoughts, what: str) -> None:
    """What is wrong shows by a multiple of what is allowed."""
    ours = case.computed.logits[list(POSITIONS)]
    difference = np.abs(ours - wrong.logits.numpy()).max()
    assert difference > 5 * LIMIT * np.abs(ours).max(), what
