"""Where a model pauses to think before its next token, and what it thought.

Letters: B rows of the batch, Q positions, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from v4export.config import ENTROPY, MARGIN
from v4export.errors import BadInput


@dataclass(frozen=True)
class Thought:
    """What thoughts about Q positions of each sequence come to.

    Attributes:
        logits: of the mixed predictions, float32 [B, Q, V].
        weight: how much of each thought is in them, float32 [B, Q].
        tokens: that were thought, int64 [B, Q, steps - 2]; none in shorter thoughts.
        hidden: after each layer of each step, where that was asked for: [M, D] by (step, layer), steps from 1.
    """

    logits: np.ndarray
    weight: np.ndarray
    tokens: np.ndarray
    hidden: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """One thought ahead of one token.

    Attributes:
        token: number of the new token, from 0.
        weight: how much of the thought is in its prediction; not limited to 0 .. 1.
        tokens: that were thought.
        text: the same, where there is a tokenizer.
        before: text of the new token.
    """

    token: int
    weight: float
    tokens: tuple[int, ...]
    text: str = ""
    before: str = ""


@dataclass(frozen=True)
class Pausing:
    """When to pause.

    Attributes:
        steps: of a thought; None is as many as the model was exported for.
        always: whatever the plain prediction is; else where it is not sure.
        confidence: what shows that: ``entropy`` above the threshold, in nats, or ``margin`` below it, the difference of
            the two largest probabilities.
        threshold: of it.
    """

    steps: int | None = None
    always: bool = False
    confidence: str = ENTROPY
    threshold: float = 1.0

    @classmethod
    def read(
        cls, asked: str | None, stored: Mapping[str, Any] | None, threshold: float | None = None
    ) -> Pausing | None:
        """From what a user asks for: a number of steps, ``auto`` or ``off``; None is ``auto`` where there are thoughts.

        Args:
            asked: by the user.
            stored: what a bundle's manifest says of thoughts; None where the model has none.
            threshold: in place of the stored one.

        Raises:
            BadInput: it is none of these, or the model does not think.
        """
        if threshold is not None and not 0 <= threshold < np.inf:
            raise BadInput(
                "the threshold is out of range", f"--think-threshold {threshold}", "give a number, 0 or more"
            )
        if asked in ("off", "0") or (asked is None and stored is None and threshold is None):
            return None
        if stored is None:
            raise BadInput(
                "this bundle has no reasoning layers",
                f"--think {asked}" if asked else f"--think-threshold {threshold}",
                "leave it out; the model has none, or was exported with --think-steps 0",
            )
        rest = {
            "confidence": stored["confidence"],
            "threshold": stored["threshold"] if threshold is None else threshold,
        }
        if asked in ("auto", None):
            return cls(**rest)
        if not asked.isdecimal():
            raise BadInput("--think is not understood", f"--think {asked}", "give a number of steps, auto or off")
        check_steps(asked, stored["steps"])
        return cls(steps=int(asked), always=True, **rest)

    def wanted(self, logits_BV: np.ndarray) -> np.ndarray:
        """Which rows are to pause, by their plain predictions: bool [B]."""
        if self.always:
            return np.ones(len(logits_BV), bool)
        return _TESTS[self.confidence](_probabilities(logits_BV), self.threshold)


def check_steps(steps: int | str, most: int) -> None:
    """Raises BadInput for a thought of fewer steps than one, or of more than the model was exported for."""
    if not 1 <= int(steps) <= most:
        raise BadInput(
            f"a thought of {steps} steps cannot be had",
            f"the model was exported for 1 to {most}",
            "give --think K within that, auto or off; or export with --think-steps K",
        )


class Thinks(Protocol):
    """An executor as far as thoughts are concerned; only of a model that thinks is it asked for any."""

    def think(
        self,
        trunk_BQD: np.ndarray,
        state: Any,
        *,
        at_BQ: np.ndarray | None = None,
        steps: int | None = None,
        looped: bool = False,
    ) -> Thought:
        """Thinks about positions that the state holds, which stays as it is.

        Args:
            trunk_BQD: ``trunk`` of the step that had them.
            state: from ``new_state``.
            at_BQ: the positions, int64; the last token of each row unless given.
            steps: of a thought; as many as the model was exported for unless given.
            looped: run a step at a time where the unrolled graph has as many steps.
        """


def paused(
    executor: Thinks,
    state: Any,
    pausing: Pausing | None,
    logits_BV: np.ndarray,
    trunk_BD: np.ndarray | None,
    running_B: np.ndarray,
    token: int,
) -> tuple[np.ndarray, tuple[Pause | None, ...]]:
    """Predictions after thinking, where there is to be any, and the thoughts.

    Args:
        executor: holds the model.
        state: of its rows.
        pausing: when; None is never.
        logits_BV: the plain predictions.
        trunk_BD: what thoughts start from.
        running_B: rows whose predictions matter.
        token: number of the new token.
    """
    none = (None,) * len(logits_BV)
    wanted_B = running_B & pausing.wanted(logits_BV) if pausing else np.zeros(len(logits_BV), bool)
    if not wanted_B.any():
        return logits_BV, none
    assert pausing is not None and trunk_BD is not None
    # Rows that need no thought ride along: one that leaves nothing behind does no harm, and copying state would.
    thought = executor.think(trunk_BD[:, None], state, steps=pausing.steps)
    pauses = [
        Pause(token, float(thought.weight[b, 0]), tuple(thought.tokens[b, 0].tolist())) if wanted else None
        for b, wanted in enumerate(wanted_B)
    ]
    return np.where(wanted_B[:, None], thought.logits[:, 0], logits_BV), tuple(pauses)


def _probabilities(logits_BV: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits_BV, np.float64)
    weights = np.exp(shifted - shifted.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def entropy(p_BV: np.ndarray) -> np.ndarray:
    """Of each row, in nats: float64 [B]."""
    return -np.where(p_BV > 0, p_BV * np.log(np.where(p_BV > 0, p_BV, 1)), 0).sum(-1)


def margin(p_BV: np.ndarray) -> np.ndarray:
    """Difference of each row's two largest probabilities: float64 [B]."""
    largest = np.partition(p_BV, -2, axis=-1)[:, -2:]
    return largest[:, 1] - largest[:, 0]


_TESTS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ENTROPY: lambda p_BV, threshold: entropy(p_BV) > threshold,
    MARGIN: lambda p_BV, threshold: margin(p_BV) < threshold,
}
