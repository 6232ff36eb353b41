"""Drafts: tokens that a small layer proposes and one step of the model then checks, as many as it likes being taken.

A row's drafts go on from tokens that are certain. The layer's state holds those alone: what was only drafted is fed
again, and not kept, for each token that is drafted further ahead.

Letters: B rows of the batch, S new tokens, Q positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from v4export.errors import BadInput

#: Tokens drafted ahead where nobody says how many: what a prediction layer is trained for.
_USUAL = 1


class Drafts(Protocol):
    """An executor as far as drafts are concerned; only of a model that drafts is it asked for any.

    Attributes:
        features: what drafts go on from, of all tokens of the last step, [B, S, ..].
    """

    features: np.ndarray | None

    def new_draft_state(self, batch: int = 1) -> Any:
        """State of the layer that drafts, which holds no tokens, for ``batch`` rows."""

    def draft(
        self,
        tokens_BS: np.ndarray,
        features: np.ndarray,
        state: Any,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray,
        commit: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Feeds the layer that drafts.

        Args:
            tokens_BS: of each token the one that follows it; padded on the right.
            features: what the model, or the layer itself, has made of each token, [B, S, ..].
            state: from ``new_draft_state``.
            logits_at_BQ: which logits are wanted.
            lengths_B: how many of the S tokens of each row are real.
            commit: whether the state is to hold them.

        Returns:
            [B, Q, V] float32 logits of what comes after the tokens, and features [B, S, ..] to draft further from.
        """


@dataclass
class Drafting:
    """How far ahead tokens are drafted, and what came of it.

    Attributes:
        most: tokens ahead of a step.
        drafted: so far.
        accepted: of them, as the model's own choice.
    """

    most: int
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, asked: int | None, drafts: bool) -> Drafting | None:
        """What is asked for of a model that drafts, or does not; None where nothing is to be drafted.

        Raises:
            BadInput: there is nothing to draft with.
        """
        if asked and not drafts:
            raise BadInput(
                "this bundle has no draft graph",
                f"{asked} tokens are to be drafted ahead",
                "leave --draft-max out, or build with --draft where the model has a prediction layer",
            )
        most = (_USUAL if drafts else 0) if asked is None else asked
        return cls(most) if most else None


@dataclass
class _Given:
    """Of one row, what is not yet drafted from: tokens, and features of the token before each, [n, ..]."""

    tokens: list[int] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)


class Drafter:
    """Drafts for the rows of a batch.

    Args:
        executor: of a model that drafts.
        batch: rows.
    """

    def __init__(self, executor: Drafts, batch: int) -> None:
        self._executor, self._state = executor, executor.new_draft_state(batch)
        self._given = [_Given() for _ in range(batch)]

    def give(self, row: int, tokens: Sequence[int], features: np.ndarray) -> None:
        """Tell a row of tokens that are certain.

        Args:
            row: of the batch.
            tokens: that follow those it knows of.
            features: of the token ahead of each, [n, ..]. They are copied: an executor may use its memory again.
        """
        self._given[row].tokens += tokens
        self._given[row].features += list(np.array(features[: len(tokens)]))

    def put(self, row: int, other: Drafter) -> None:
        """Make a row know what ``other``, of one row, does."""
        self._state.put(row, other._state)
        given = other._given[0]
        self._given[row] = _Given(list(given.tokens), list(given.features))

    def read(self) -> None:
        """Let the layer's state hold what the rows were told, where nothing is to be drafted yet."""
        lengths_B = self._waiting(len(self._given))
        if lengths_B.any():
            none = np.zeros((len(lengths_B), 0), np.int64)
            self._executor.draft(*self._take(lengths_B), self._state, logits_at_BQ=none, lengths_B=lengths_B)

    def propose(self, most: Sequence[int]) -> list[list[int]]:
        """Draft for the first rows, each at most so many tokens; none for those that were told nothing new."""
        count, lengths_B = len(most), self._waiting(len(most))
        most_B = np.where(lengths_B > 0, most, 0)
        deepest, rows = int(most_B.max()), np.arange(count)
        if not deepest:
            return [[] for _ in most]
        part = count < len(self._given)
        state = self._state.first(count, int(lengths_B.max()) + deepest) if part else self._state
        last_B = np.maximum(lengths_B - 1, 0)
        fed = self._take(lengths_B)
        logits_BQV, handed = self._executor.draft(*fed, state, logits_at_BQ=last_B[:, None], lengths_B=lengths_B)
        tokens, features = [logits_BQV[:, 0].argmax(-1)], [handed[rows, last_B]]
        for ahead in range(1, deepest):
            logits_BQV, handed = self._executor.draft(
                np.stack(tokens, 1),
                np.stack(features, 1),
                state,
                logits_at_BQ=np.full((count, 1), ahead - 1),
                lengths_B=np.where(most_B > ahead, ahead, 0),
                commit=False,
            )
            tokens.append(logits_BQV[:, 0].argmax(-1))
            features.append(handed[:, ahead - 1])
        if part:
            self._state.adopt(state)
        return [np.stack(tokens, 1)[row, : most_B[row]].tolist() for row in rows]

    def _waiting(self, count: int) -> np.ndarray:
        """How many tokens the first rows were told that are not yet drafted from, [B]."""
        return np.array([len(one.tokens) for one in self._given[:count]], np.int64)

    def _take(self, lengths_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those tokens [B, S] and their features [B, S, ..], padded with zeros; the rows have none then."""
        given = self._given[: len(lengths_B)]
        like = next(one.features[0] for one in given if one.features)
        shape = len(given), int(lengths_B.max())
        tokens_BS, features = np.zeros(shape, np.int64), np.zeros((*shape, *like.shape), like.dtype)
        for b, one in enumerate(given):
            if one.tokens:
                tokens_BS[b, : len(one.tokens)], features[b, : len(one.tokens)] = one.tokens, one.features
            self._given[b] = _Given()
        return tokens_BS, features
