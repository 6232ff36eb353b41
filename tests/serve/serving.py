"""An executor without a graph, and listeners, for tests of schedulers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from hashed_model import VOCAB, hashed_logits

from v4export.serve.answer import Failed, Piece, Usage

WAIT_S = 30


@dataclass
class Rows:
    """A state: the tokens of each row. ``of`` is how many rows it, or the state that it is the beginning of, has."""

    rows: list[list[int]]
    of: int

    def put(self, b: int, other: Rows) -> None:
        self.rows[b] = list(other.rows[0])

    def first(self, count: int, room: int = 1) -> Rows:
        return Rows([list(row) for row in self.rows[:count]], self.of)

    def adopt(self, first: Rows) -> None:
        self.rows[: len(first.rows)] = first.rows

    @property
    def lengths_B(self) -> np.ndarray:
        return np.array([len(row) for row in self.rows])


@dataclass
class FakeExecutor:
    """Remembers tokens; padding gives NaN, so that using it is an error. ``before`` is called ahead of every step.

    ``steps`` has of every step how many rows its state is of, how many had tokens, and the width.
    """

    max_seq_len: int = 64
    tail: int | None = None
    trunk: np.ndarray | None = None
    before: Callable[[np.ndarray, Any], None] = lambda tokens_BS, state: None
    steps: list[tuple[int, int, int]] = field(default_factory=list)

    def new_state(self, batch: int = 1) -> Rows:
        return Rows([[] for _ in range(batch)], batch)

    def step(self, tokens_BS, state, *, logits_at_BQ, lengths_B=None, coming=None) -> np.ndarray:
        batch, width = tokens_BS.shape
        self.before(tokens_BS, state)
        lengths = [width] * batch if lengths_B is None else lengths_B.tolist()
        assert tokens_BS.dtype == logits_at_BQ.dtype == np.int64 and len(state.rows) == batch == len(logits_at_BQ)
        self.steps.append((state.of, sum(n > 0 for n in lengths), width))
        logits = np.full((*logits_at_BQ.shape, VOCAB), np.nan, np.float32)
        for row, length in enumerate(lengths):
            for q, position in enumerate(logits_at_BQ[row].tolist()):
                if position < length:
                    logits[row, q] = hashed_logits(state.rows[row] + tokens_BS[row, : position + 1].tolist())
            state.rows[row] += tokens_BS[row, :length].tolist()
            assert len(state.rows[row]) <= self.max_seq_len
        return logits


class Letters:
    """A tokenizer as far as a scheduler needs one: a letter for every token."""

    def stream(self) -> Any:
        return self

    def push(self, token: int) -> str:
        return letter(token)

    def flush(self) -> str:
        return ""


def letter(token: int) -> str:
    return chr(0x4E00 + token % 0x5000)


class Listener:
    """Gathers what becomes of a request. ``at`` is called with every piece, by the scheduler's thread."""

    def __init__(self, at: Callable[[Piece], None] = lambda piece: None) -> None:
        self.tokens: list[int] = []
        self.text, self.reason = "", None
        self.usage: Usage | None = None
        self.error: Exception | None = None
        self._at, self._ended = at, threading.Event()

    def __call__(self, event: Piece | Failed) -> None:
        assert not self._ended.is_set(), "something came after the end"
        if isinstance(event, Failed):
            self.error = event.error
            self._ended.set()
            return
        self.tokens.append(event.token)
        self.text += event.text
        self._at(event)
        if event.finish_reason:
            self.reason, self.usage = event.finish_reason, event.usage
            self._ended.set()

    def wait(self) -> Listener:
        assert self._ended.wait(WAIT_S), "it never ended"
        return self


class _Answer:
    """A response sender."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text, self._ended = "", threading.Event()

    def send(self, response, flags=0):
        if response.error:
            self.text = str(response.error)
        for one in response.outputs:
            values = one.as_numpy().tolist()
            self.tokens += values if one.name == "token_ids" else []
            self.text += values[0].decode() if one.name == "text_output" else ""
        if flags:
            self._ended.set()

    def is_cancelled(self):
        return False

    def wait(self) -> bool:
        return self._ended.wait(30)


def _tensor(name, array):
    return SimpleNamespace(name=name, as_numpy=lambda: np.asarray(array))


def triton_utilities():
    """The module that only a server has, and answers by their prompts, which are none yet."""

    def response(outputs=(), error=None):
        return SimpleNamespace(outputs=outputs, error=error)

    tensor = _tensor
    tensor.from_dlpack = _tensor
    error = SimpleNamespace(INVALID_ARG=0, UNSUPPORTED=1, UNAVAILABLE=2, CANCELLED=3, INTERNAL=4)
    return SimpleNamespace(
        Tensor=tensor,
        TritonError=error,
        InferenceResponse=response,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: request.given.get(name),
    ), {}


def triton_request(prompt, new, answers, **more):
    """A request for so many tokens after a prompt, whose answer is gathered."""
    answers[prompt] = _Answer()
    given = {"text_input": [prompt.encode()], "max_tokens": [new], "ignore_eos": [True]}
    given |= {name: [value] for name, value in more.items()}
    tensors = {
        name: _tensor(name, np.array(value, np.object_ if name == "text_input" else None))
        for name, value in given.items()
    }
    return SimpleNamespace(given=tensors, get_response_sender=lambda: answers[prompt])
