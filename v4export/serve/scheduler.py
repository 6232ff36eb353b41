"""Continuous batching: rows of one batch are given to requests as they come and taken back as they end.

A new prompt is read in a state of its own, a chunk at a time, and then put into a free row. Between two chunks all rows
get their next token, so no stream waits for longer than a chunk takes.

Of a model that drafts, a step checks the drafts of each row at once, of which each accepts as many as it likes.

Letters: B rows of the batch, S new tokens, Q positions whose logits are wanted, V vocabulary, D hidden.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4export.errors import BadInput, V4Error
from v4export.runtime.drafting import Drafter
from v4export.runtime.generate import Executor
from v4export.runtime.pausing import paused
from v4export.runtime.tokenizer import Tokenizer
from v4export.serve.answer import Answer, Cancelled, Closed, OnEvent, QueueFull, Request
from v4export.serve.limits import Limits
from v4export.serve.metrics import Metrics


@dataclass
class _Reading:
    """A prompt that is being read."""

    answer: Answer
    state: Any
    drafter: Drafter | None
    done: int = 0


class Scheduler:
    """Serves requests over one executor with a thread of its own. A context manager; ``close`` ends the thread.

    Args:
        executor: runs the graph. Its states have ``put``, ``first`` and ``adopt`` (``runtime/state.py``).
        tokenizer: of its model.
        limits: how many at a time; the defaults unless given.
    """

    def __init__(self, executor: Executor, tokenizer: Tokenizer, limits: Limits | None = None) -> None:
        self.limits = limits = limits or Limits()
        self.metrics = Metrics()
        self._executor, self._tokenizer = executor, tokenizer
        self._waiting: deque[Answer] = deque()
        self._reading: _Reading | None = None
        self._rows: list[Answer | None] = [None] * limits.slots
        self._last_B = np.zeros(limits.slots, np.int64)  # tokens that the rows are fed next
        self._empty, self._state = executor.new_state(1), executor.new_state(limits.slots)
        self._drafter, self._no_drafts = self._new_drafter(limits.slots), self._new_drafter(1)
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._loop, name="v4export scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, on_event: OnEvent, is_cancelled: Callable[[], bool] = lambda: False) -> Answer:
        """Let a request be answered; any thread may.

        Args:
            request: what is asked for.
            on_event: told every piece, the last with its reason, or one failure.
            is_cancelled: asked at every step; ``cancel`` of what is returned does the same.

        Raises:
            BadInput: the prompt is empty, or it and the new tokens are more than a sequence can have.
            QueueFull, Closed: it cannot be taken now.
        """
        self._check(request)
        answer = Answer(request, self._tokenizer, on_event, is_cancelled)
        with self._changed:
            if self._closing:
                raise Closed("the server is closing", fix="ask again once it is back")
            if len(self._waiting) >= self.limits.queue:
                self._drop_cancelled()
            if len(self._waiting) >= self.limits.queue:
                self.metrics.add("refused", 1)
                raise QueueFull("the queue is full", f"{self.limits.queue} requests wait", "ask again later")
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def close(self) -> None:
        """End the thread after its step; whatever is on its way fails with ``Closed``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _check(self, request: Request) -> None:
        prompt, most = len(request.tokens), self._executor.max_seq_len
        if not prompt:
            raise BadInput("the prompt is empty", "0 tokens", "give a text to continue")
        if request.max_tokens < 1:
            raise BadInput("max_tokens is too small", f"{request.max_tokens}", "it has to be 1 or more")
        if prompt + request.max_tokens > most:
            raise BadInput(
                "the prompt and the new tokens are more than a sequence can have",
                f"{prompt} and {request.max_tokens}, at most {most} together",
                "shorten the prompt, ask for fewer, or export with a larger --max-seq-len",
            )

    def _loop(self) -> None:
        try:
            while self._wait():
                self._sweep()
                self._admit()
                self._read_chunk()
                self._decode()
                self._gauge()
        except Exception as error:  # no room for another batch, say: who asks must not wait for ever
            self._end_all(Closed("serving has ended", str(error), "start the server anew"))
            raise
        self._end_all(Closed("the server was closed before the answer was complete", fix="ask again once it is back"))

    def _wait(self) -> bool:
        """Until there is something to do; False once it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._reading or any(self._rows))
            return not self._closing

    def _sweep(self) -> None:
        """Take rows back whose answers nobody wants."""
        for row, answer in enumerate(self._rows):
            if answer and answer.cancelled:
                self._fail(answer, _cancelled())
                self._free(row)
        if self._reading and self._reading.answer.cancelled:
            self._fail(self._reading.answer, _cancelled())
            self._reading = None

    def _admit(self) -> None:
        """Begin to read the next prompt, if it will find a row."""
        while self._reading is None and None in self._rows:
            with self._changed:
                answer = self._waiting.popleft() if self._waiting else None
            if answer is None:
                return
            if answer.cancelled:
                self._fail(answer, _cancelled())
                continue
            answer.started()
            self.metrics.add("queue_seconds", answer.taken - answer.submitted)
            try:
                drafter = self._new_drafter(1) if answer.request.draft_max else None
                self._reading = _Reading(answer, self._executor.new_state(1), drafter)
            except Exception as error:
                self._fail(answer, error)

    def _read_chunk(self) -> None:
        """Feed the next part of the prompt that is being read; after its last, the answer has a row and a token."""
        if not (reading := self._reading):
            return
        answer, start = reading.answer, reading.done
        tokens = answer.request.tokens[start : start + self.limits.chunk]
        reading.done += len(tokens)
        ends = reading.done == len(answer.request.tokens)
        wanted = np.array([[len(tokens) - 1]] if ends else [[]], np.int64)
        try:
            logits = self._executor.step(np.array([tokens], np.int64), reading.state, logits_at_BQ=wanted)
            self.metrics.add("prompt_tokens", len(tokens))
            if reading.drafter:
                following = answer.request.tokens[start + 1 : reading.done + 1]
                reading.drafter.give(0, following, self._features(0))
                reading.drafter.read()
            if not ends:
                return
            row = self._rows.index(None)
            self._rows[row], self._reading = answer, None
            self._state.put(row, reading.state)
            if self._drafter and reading.drafter:
                self._drafter.put(row, reading.drafter)
            self._pick(logits, reading.state, {0: row}, [[]], len(tokens) - 1)
            self._free_ended()
        except Exception as error:  # of this prompt alone, whose state is its own
            self._reading = None
            if answer in self._rows:
                self._free(self._rows.index(answer))
            self._fail(answer, error)

    def _decode(self) -> None:
        """One more token for every row that has an answer, and one for each of its drafts that is right."""
        rows = [row for row, answer in enumerate(self._rows) if answer]
        if not rows:
            return
        # Rows are given out from the first on, so that a few answers are a small batch.
        count = rows[-1] + 1
        try:
            drafts = self._drafts(count)
            fed = [[last, *ahead] for last, ahead in zip(self._last_B[:count].tolist(), drafts, strict=True)]
            width = max(map(len, fed))
            lengths_B = np.array([len(fed[row]) if self._rows[row] else 0 for row in range(count)])
            state = self._state.first(count, width)
            checked: dict[str, Any] = {"commit": False} if width > 1 else {}
            logits_BQV = self._executor.step(
                np.array([[*tokens, *[0] * (width - len(tokens))] for tokens in fed], np.int64),
                state,
                logits_at_BQ=np.broadcast_to(np.arange(width), (count, width)),
                lengths_B=None if (lengths_B == width).all() else lengths_B,
                **checked,
            )
            counts_B = self._pick(logits_BQV, state, {row: row for row in rows}, drafts)
            if width > 1:
                state.commit(counts_B)
            self._state.adopt(state)
            self._free_ended()
        except Exception as error:  # what the rows hold is no longer known
            for row in rows:
                if answer := self._rows[row]:
                    self._fail(answer, error)
            slots = self.limits.slots
            self._rows = [None] * slots
            self._state, self._drafter = self._executor.new_state(slots), self._new_drafter(slots)

    def _drafts(self, count: int) -> list[list[int]]:
        """What is drafted for the first rows."""
        if self._drafter is None:
            return [[] for _ in range(count)]
        answers = self._rows[:count]
        most = [min(a.request.draft_max, a.request.max_tokens - a.count - 1) if a else 0 for a in answers]
        drafts = self._drafter.propose(most)
        for answer, ahead in zip(answers, drafts, strict=True):
            if answer:
                answer.drafted += len(ahead)
        self.metrics.add("drafted_tokens", sum(map(len, drafts)))
        return drafts

    def _new_drafter(self, batch: int) -> Drafter | None:
        return Drafter(self._executor, batch) if self.limits.draft_max else None

    def _features(self, at: int) -> np.ndarray:
        """What drafts of a row go on from, of all tokens of the last step."""
        assert self._executor.features is not None
        return self._executor.features[at]

    def _pick(
        self, logits_BQV: np.ndarray, state: Any, rows: dict[int, int], drafts: Sequence[list[int]], first: int = 0
    ) -> np.ndarray:
        """The next tokens of rows of a step, by their rows in the batch, after thinking where that is wanted.

        Logits are of tokens of the step from number ``first`` on. Returns how many each row got, [B].
        """
        trunk = self._executor.trunk
        logits_BV = self._thought(logits_BQV[:, 0], trunk if trunk is None else trunk[:, 0], state, rows)
        counts_B = np.zeros(len(logits_BQV), np.int64)
        for at, row in rows.items():
            answer, tokens = self._rows[row], list[int]()
            assert answer
            try:
                for token in self._of_row(answer, logits_BV[at], logits_BQV[at, 1:], drafts[at]):
                    tokens.append(token)
            except Exception as error:  # no number, say, or nobody listens; the other rows have nothing to do with it
                self._fail(answer, error)
            counts_B[at] = len(tokens)
            if tokens and not answer.ended:
                self._last_B[row] = tokens[-1]
                if self._drafter and answer.request.draft_max:
                    self._drafter.give(row, tokens, self._features(at)[first:])
        return counts_B

    def _of_row(self, answer: Answer, logits_V: np.ndarray, rest_QV: np.ndarray, drafts: list[int]) -> Iterator[int]:
        """An answer's new tokens, of which it is told, until one is not as it was drafted."""
        for q in range(len(drafts) + 1):
            token = int(answer.sampler.pick((rest_QV[q - 1] if q else logits_V)[None])[0])
            right = drafts[q : q + 1] == [token]
            answer.accepted += right
            self.metrics.add("accepted_tokens", right)
            answer.push(token)
            self.metrics.token(answer)
            yield token
            if answer.ended or not right:
                return

    def _free_ended(self) -> None:
        for row, answer in enumerate(self._rows):
            if answer and answer.ended:
                self._free(row)

    def _thought(
        self, logits_BV: np.ndarray, trunk_BD: np.ndarray | None, state: Any, rows: dict[int, int]
    ) -> np.ndarray:
        """Predictions after thinking, once for each way to think that any of the rows asks for."""
        asked = {at: answer.request.pausing for at, row in rows.items() if (answer := self._rows[row])}
        for pausing in dict.fromkeys(filter(None, asked.values())):
            running_B = np.zeros(len(logits_BV), bool)
            running_B[[at for at, one in asked.items() if one == pausing]] = True
            logits_BV, pauses = paused(self._executor, state, pausing, logits_BV, trunk_BD, running_B, 0)
            for at, pause in enumerate(pauses):
                if pause and (answer := self._rows[rows[at]]):
                    answer.thoughts += 1
                    self.metrics.add("thoughts", 1)
        return logits_BV

    def _free(self, row: int) -> None:
        """An empty row costs no cached tokens."""
        self._rows[row] = None
        self._state.put(row, self._empty)
        if self._drafter and self._no_drafts:
            self._drafter.put(row, self._no_drafts)

    def _fail(self, answer: Answer, error: Exception) -> None:
        self.metrics.add("cancelled" if isinstance(error, Cancelled) else "failed", 1)
        try:
            answer.fail(error)
        except Exception:  # it was told as well as it could be
            answer.ended = True

    def _drop_cancelled(self) -> None:
        gone = [answer for answer in self._waiting if answer.cancelled]
        for answer in gone:
            self._waiting.remove(answer)
            self._fail(answer, _cancelled())

    def _gauge(self) -> None:
        self.metrics.set("waiting", len(self._waiting))
        self.metrics.set("running", sum(answer is not None for answer in self._rows))
        if replays := getattr(self._executor, "replays", None):
            self.metrics.set("replayed_steps", replays.replayed)

    def _end_all(self, error: V4Error) -> None:
        with self._changed:
            self._closing = True
            reading = [self._reading.answer] if self._reading else []
            left = [*(answer for answer in self._rows if answer), *reading, *self._waiting]
            self._waiting.clear()
        self._rows, self._reading = [None] * self.limits.slots, None
        for answer in left:
            self._fail(answer, error)
        self._gauge()


def _cancelled() -> Cancelled:
    return Cancelled("the request was cancelled")
