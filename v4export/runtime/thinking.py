"""Runs thoughts: the unrolled graph, or one step at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from v4export.config import ModelConfig
from v4export.graphs.export import THINKING, THINKING_MIX, THINKING_STEP
from v4export.runtime.pausing import Thought, check_steps


class Runs(Protocol):
    """What runs a graph, as ``runtime.sessions.Session`` does."""

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], fetched: Sequence[str]) -> dict[str, Any]:
        """From inputs by name, what is fetched and what the graph was opened to return besides."""


class Thinker:
    """The graphs of a bundle's thoughts.

    Args:
        opened: a graph, by its name and those of values inside it that it returns as well.
        config: the model.
        dtype: of activations.
        taps: return hidden states after each layer as well.
    """

    def __init__(
        self, opened: Callable[[str, Sequence[str]], Runs], config: ModelConfig, dtype: np.dtype, taps: bool = False
    ) -> None:
        assert config.reasoning is not None
        self._dtype = dtype
        self.config, self.steps, self.layers = config, config.reasoning.steps, range(config.reasoning.layers)
        each = {(k, j): f"thought.{k}.{j}" for k in range(1, self.steps + 1) for j in self.layers}
        self._taps = each if taps else {}
        self._step_taps = [f"thought.{j}" for j in self.layers] if taps else []
        # A caller needs one form or the other, and a session has weights of its own.
        self._whole = functools.cache(lambda: opened(THINKING, tuple(self._taps.values())))
        self._step = functools.cache(lambda: opened(THINKING_STEP, self._step_taps))
        self._mix = functools.cache(lambda: opened(THINKING_MIX, ()))

    def think(
        self,
        trunk_BQD: np.ndarray,
        at_BQ: np.ndarray,
        rows: Mapping[str, Any],
        steps: int | None = None,
        looped: bool = False,
    ) -> Thought:
        """Think about positions.

        Args:
            trunk_BQD: the model's last hidden states there, in any type that holds them.
            at_BQ: the positions, int64.
            rows: of each reasoning layer its state of the sequences, by the graphs' names, wherever the graphs read it.
            steps: of a thought; the unrolled graph has its own number, any up to it can be looped.
            looped: run a step at a time whatever their number.

        Raises:
            BadInput: there were to be no steps, or more than the model was exported for.
        """
        steps = self.steps if steps is None else steps
        check_steps(steps, self.steps)
        given = {"trunk": np.ascontiguousarray(trunk_BQD, self._dtype), "thought_at": at_BQ, **rows}
        return self._loop(given, steps) if looped or steps < self.steps else self._unrolled(given)

    def _unrolled(self, given: dict[str, Any]) -> Thought:
        names = ["logits", "weight", *(["tokens"] if self.steps > 2 else [])]
        found = self._whole().run(given, {}, names)
        tokens = found.get("tokens", _none(given["thought_at"]))
        hidden = {place: found[name] for place, name in self._taps.items()}
        return Thought(found["logits"], found["weight"], tokens, hidden)

    def _loop(self, given: dict[str, Any], steps: int) -> Thought:
        trunk, at_BQ = given.pop("trunk"), given["thought_at"]
        # Behind the vocabulary: what stands for the start of a thought, and for its end.
        start, end = self.config.vocab_size, self.config.vocab_size + 1
        thought, token_BQ, tokens = trunk, np.full(at_BQ.shape, start), []
        empty = np.zeros((0, *at_BQ.shape, self.config.thinker.latent_dim), trunk.dtype)
        own = {f"own.{j}": empty for j in self.layers}
        hidden: dict[tuple[int, int], np.ndarray] = {}
        for k in range(1, steps + 1):
            if 1 < k < steps:
                tokens.append(token_BQ)
            elif k > 1:
                token_BQ = np.full(at_BQ.shape, end)
            inputs = {**given, **own, "thought": thought, "entering": token_BQ}
            found = self._step().run(inputs, {}, ["new_thought", "token", *(f"new_{name}" for name in own)])
            thought, token_BQ = found["new_thought"], found["token"]
            own = {name: found[f"new_{name}"] for name in own}
            hidden |= {(k, j): found[name] for j, name in enumerate(self._step_taps)}
        mixed = self._mix().run({"trunk": trunk, "thought": thought}, {}, ["logits", "weight"])
        thought_tokens = np.stack(tokens, -1) if tokens else _none(at_BQ)
        return Thought(mixed["logits"], mixed["weight"], thought_tokens, hidden)


def _none(at_BQ: np.ndarray) -> np.ndarray:
    """No tokens for each position."""
    return np.zeros((*at_BQ.shape, 0), np.int64)
