"""A request, what becomes of it, and its text as its tokens come."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from v4export.errors import V4Error
from v4export.runtime.generate import FinishReason, StopStrings
from v4export.runtime.pausing import Pausing
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.tokenizer import Tokenizer


class QueueFull(V4Error):
    """As many requests wait as may."""


class Closed(V4Error):
    """Nothing is served any more."""


class Cancelled(V4Error):
    """Who asked does not want the answer any more."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        tokens: of the prompt.
        max_tokens: the most new ones.
        sampling: how they are picked.
        stop_ids: tokens that end the answer.
        stop_strings: the text ends before the first of them.
        pausing: when to think before a token; None is never.
        draft_max: the most tokens drafted ahead of a step.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    pausing: Pausing | None = None
    draft_max: int = 0


@dataclass(frozen=True)
class Usage:
    """What an answer took. Seconds from the call that submitted it, and between its first and its last token."""

    prompt_tokens: int
    new_tokens: int
    thoughts: int
    queued_s: float
    first_token_s: float
    decode_s: float
    drafted: int = 0  # tokens
    accepted: int = 0  # of them


@dataclass(frozen=True)
class Piece:
    """One new token, and the text that is certain by it, possibly none. The last one says why it is the last."""

    token: int
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Failed:
    """There will be no more pieces, and why."""

    error: Exception


#: Told every piece of an answer, or that it failed, by the scheduler's thread. Whatever it raises ends the answer.
OnEvent = Callable[[Piece | Failed], None]


class Answer:
    """A request on its way: waiting, being read, or a row of the batch.

    Args:
        request: what is asked for.
        tokenizer: of the model.
        on_event: told what comes.
        is_cancelled: asked at every step whether the answer is still wanted.

    Raises:
        BadInput: a stop string is empty.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        on_event: OnEvent,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.request, self._on_event, self._is_cancelled = request, on_event, is_cancelled
        self.sampler = Sampler(request.sampling)
        self._stops, self._stream = StopStrings(request.stop_strings), tokenizer.stream()
        self._asked_to_stop = self.ended = False
        self.usage: Usage | None = None  # once it is complete
        self.count = self.thoughts = self.drafted = self.accepted = 0
        self.submitted = self.taken = self.first = time.monotonic()

    def cancel(self) -> None:
        """Let it end at the next step; any thread may."""
        self._asked_to_stop = True

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        if not self._asked_to_stop:
            try:
                self._asked_to_stop = self._is_cancelled()
            except Exception:  # who cannot be asked has gone
                self._asked_to_stop = True
        return self._asked_to_stop

    def started(self) -> None:
        """Its prompt is about to be read."""
        self.taken = time.monotonic()

    def push(self, token: int) -> None:
        """Take the next token, and tell of it."""
        now = time.monotonic()
        self.first = now if self.count == 0 else self.first
        self.count += 1
        stopped = token in self.request.stop_ids
        # A stop id is a mark, even where it stands for text.
        text = "" if stopped else self._stops.push(self._stream.push(token))
        if stopped or self.count == self.request.max_tokens:
            text += self._stops.push(self._stream.flush()) + self._stops.flush()
            self.ended = True
        if self._stops.matched:
            stopped = self.ended = True
        self.usage = self._usage(now) if self.ended else None
        reason: FinishReason | None = "stop" if stopped else "length" if self.ended else None
        self._on_event(Piece(token, text, reason, self.usage))

    def fail(self, error: Exception) -> None:
        """End it by an error, of which nobody may want to hear."""
        self.ended = True
        self._on_event(Failed(error))

    def _usage(self, now: float) -> Usage:
        times = (self.taken - self.submitted, self.first - self.submitted, now - self.first)
        return Usage(len(self.request.tokens), self.count, self.thoughts, *times, self.drafted, self.accepted)
