from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export.errors import BadInput, NumbersDiffer
from v4export.runtime.generate import Coming, Event, Generation, StopStrings, generate, run_text
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.tokenizer import Tokenizer

VOCAB = 97


def hashed_logits(history: Sequence[int]) -> np.ndarray:
    """[V], a function of every token so far and of their order."""
    value = 1
    for token in history:
        value = (value * 1_000_003 + token + 7) % (2**61 - 1)
    return np.random.default_rng(value).normal(size=VOCAB).astype(np.float32)


@dataclass
class FakeExecutor:
    """Remembers every token fed; a position that is padding gives NaN, so that using one is an error."""

    max_seq_len: int = 64
    rule: Callable[[Sequence[int]], np.ndarray] = hashed_logits
    vocab: int = VOCAB
    tail: int | None = None
    trunk: np.ndarray | None = None
    widths: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def new_state(self, batch: int = 1) -> list[list[int]]:
        return [[] for _ in range(batch)]

    def step(
        self,
        tokens_BS: np.ndarray,
        state: Any,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> np.ndarray:
        batch, width = tokens_BS.shape
        lengths = [width] * batch if lengths_B is None else lengths_B.tolist()
        assert tokens_BS.dtype == logits_at_BQ.dtype == np.int64 and len(state) == batch == len(logits_at_BQ)
        assert all(0 <= length <= width for length in lengths)
        assert ((logits_at_BQ >= 0) & (logits_at_BQ < width)).all()
        self.widths.append(width)
        self.wanted.append(logits_at_BQ.shape[1])
        logits_BQV = np.full((*logits_at_BQ.shape, self.vocab), np.nan, np.float32)
        for row, length in enumerate(lengths):
            for q, position in enumerate(logits_at_BQ[row].tolist()):
                if position < length:
                    logits_BQV[row, q] = self.rule(state[row] + tokens_BS[row, : position + 1].tolist())
            state[row] += tokens_BS[row, :length].tolist()
            assert len(state[row]) <= self.max_seq_len
        return logits_BQV


def rows_of(events: Iterable[Event]) -> tuple[list[list[int]], list[str | None]]:
    """New tokens of each row, and why it finished."""
    seen = list(events)
    tokens = [[t for t in column if t is not None] for column in zip(*(e.tokens_B for e in seen), strict=True)]
    assert [event.step for event in seen] == list(range(len(seen)))
    return tokens, list(seen[-1].finished_B)


def run(prompts: Sequence[Sequence[int]], *, chunk: int = 512, **options: Any) -> tuple[list[list[int]], list[Any]]:
    arguments: dict[str, Any] = {"max_new_tokens": 12, "sampler": Sampler(Sampling()), **options}
    return rows_of(generate(FakeExecutor(), prompts, chunk=chunk, **arguments))


def expected_greedy(prompt: Sequence[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(int(hashed_logits(history).argmax()))
    return history[len(prompt) :]


PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(PROMPTS, st.integers(1, 25))
def test_a_batch_gives_what_each_prompt_gives_alone(prompts: list[list[int]], chunk: int) -> None:
    tokens, reasons = run(prompts, chunk=chunk)
    assert tokens == [expected_greedy(prompt, 12) for prompt in prompts]
    assert reasons == ["length"] * len(prompts)


def test_chunk_does_not_change_sampled_tokens() -> None:
    prompts = [list(range(1, 18)), [5], [9, 9, 9, 9]]
    results = [
        run(prompts, chunk=chunk, sampler=Sampler(Sampling(temperature=1.0, top_p=0.9, seed=3)))
        for chunk in (1, 3, 4, 512)
    ]
    assert all(result == results[0] for result in results)


def test_prefill_wants_logits_only_where_a_prompt_ends() -> None:
    executor = FakeExecutor()
    rows_of(generate(executor, [[1] * 10, [2] * 3], max_new_tokens=2, sampler=Sampler(Sampling()), chunk=4))
    assert executor.widths == [4, 4, 2, 1]
    assert executor.wanted == [1, 0, 1, 1]


def test_a_row_that_stops_leaves_the_others_as_they_were() -> None:
    prompts = [[1, 2, 3], [4], [5, 6]]
    free = [expected_greedy(prompt, 12) for prompt in prompts]
    stop = next(token for token in free[1][2:] if token not in free[0] + free[2] + free[1][:2])
    tokens, reasons = run(prompts, stop_ids=frozenset({stop}))
    assert tokens == [free[0], free[1][: free[1].index(stop) + 1], free[2]]
    assert reasons == ["length", "stop", "length"]


def test_finished_rows_give_none() -> None:
    first = expected_greedy([4], 1)[0]
    events = list(
        generate(
            FakeExecutor(), [[4], [1, 2]], max_new_tokens=2, sampler=Sampler(Sampling()), stop_ids=frozenset({first})
        )
    )
    assert events[0].tokens_B[0] == first and events[0].finished_B == ("stop", None)
    assert events[1].tokens_B[0] is None and events[1].finished_B == ("stop", "length")


@pytest.mark.parametrize("length", [1, 5, 8])
def test_a_full_state_ends_a_row(length: int) -> None:
    executor = FakeExecutor(max_seq_len=8)
    tokens, reasons = rows_of(generate(executor, [[3] * length, [1]], max_new_tokens=99, sampler=Sampler(Sampling())))
    # The last token is never fed, so it needs no room.
    assert [len(row) for row in tokens] == [8 - length + 1, 8] and reasons == ["length", "length"]


def test_logits_that_are_no_numbers_are_reported() -> None:
    def rule(history: Sequence[int]) -> np.ndarray:
        return np.full(VOCAB, np.nan) if len(history) == 5 else hashed_logits(history)

    with pytest.raises(NumbersDiffer, match="step 2"):
        list(generate(FakeExecutor(rule=rule), [[1, 2, 3]], max_new_tokens=9, sampler=Sampler(Sampling())))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 has no tokens"),
        ([[1], [2] * 65], {}, "prompt 1 has 65 tokens, max_seq_len is 64"),
        ([], {}, "number of prompts = 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"chunk": 0}, "chunk = 0"),
    ],
)
def test_bad_input_is_found_by_the_call(prompts: list[list[int]], options: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        generate(FakeExecutor(), prompts, **{"max_new_tokens": 1, "sampler": Sampler(Sampling()), **options})  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_the_same_however_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    filter_ = StopStrings(stops)
    shown = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += filter_.push(text[start:end])
        assert not any(stop in shown for stop in stops)
    shown += filter_.flush()
    ends = [(i, len(stop)) for i in range(len(text) + 1) for stop in stops if text[:i].endswith(stop)]
    first = min(((end, -length) for end, length in ends), default=None)
    assert shown == (text if first is None else text[: first[0] + first[1]])
    assert filter_.matched == bool(ends)


def test_stop_strings_hold_back_only_what_may_match() -> None:
    filter_ = StopStrings(["</s>"])
    assert [filter_.push(piece) for piece in ("ab<", "/", "x", "<", "</", "s> tail", "more")] == [
        *("ab", "", "</x", "", "<", "", "")
    ]
    assert filter_.matched and filter_.flush() == ""
    with pytest.raises(BadInput, match="stop string is empty"):
        StopStrings([""])


class ByteTokenizer(Tokenizer):
    """One token a byte; 256 begins a text and 257 ends it."""

    def __init__(self) -> None:
        config = {"bos_token": "<begin>", "eos_token": "<end>", "add_bos_token": True}
        super().__init__(config, {"<begin>": 256, "<end>": 257}.get, {256, 257}, 258)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def _ids(self, text: str) -> list[int]:
        return list(text.encode())

    def _bytes_of(self, token_id: int) -> bytes:
        return bytes([token_id])


def reciting(prompt: str, answer: bytes) -> FakeExecutor:
    """An executor that answers a prompt with given bytes, then the end token for ever."""

    def rule(history: Sequence[int]) -> np.ndarray:
        at = len(history) - len(prompt.encode()) - 1
        logits_V = np.zeros(258, np.float32)
        logits_V[answer[at] if at < len(answer) else 257] = 1
        return logits_V

    return FakeExecutor(max_seq_len=200, rule=rule, vocab=258)


def told(answer: str | bytes, **options: Any) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    data = answer.encode() if isinstance(answer, str) else answer
    arguments: dict[str, Any] = {"max_new_tokens": 100, "chunk": 3, "on_text": pieces.append, **options}
    result = run_text(reciting("hello", data), ByteTokenizer(), "hello", **arguments)
    assert "".join(pieces) == result.text and "" not in pieces
    return result, pieces


def test_run_text_streams_whole_characters() -> None:
    answer = "né 🙂 你好 👩‍👧"
    result, pieces = told(answer)
    assert result.text == answer and result.finish_reason == "stop"
    assert result.tokens == (*answer.encode(), 257) and result.prompt_tokens == 1 + len("hello")
    assert pieces == list(answer)


def test_run_text_ends_at_stop_strings_that_span_tokens() -> None:
    result, pieces = told("one\nUser: two", stop_strings=["User:", "\nUs"])
    assert result.text == "one" == "".join(pieces) and result.finish_reason == "stop"
    assert bytes(result.tokens) == b"one\nUs"


def test_run_text_gives_back_what_it_held_when_no_stop_string_came() -> None:
    result, _ = told("ends with Use", stop_strings=["User:"])
    assert result.text == "ends with Use" and result.finish_reason == "stop"


def test_run_text_length() -> None:
    result, _ = told("abcdef", max_new_tokens=3)
    assert (result.text, result.finish_reason, len(result.tokens)) == ("abc", "length", 3)
    half, _ = told("é".encode()[:1], max_new_tokens=1)
    assert half.text == "\ufffd"


def test_run_text_stop_ids_and_ignore_eos() -> None:
    result, _ = told("abcd", stop_ids=frozenset({ord("c")}))
    assert (result.text, result.tokens, result.finish_reason) == ("ab", tuple(b"abc"), "stop")
    ignoring, _ = told("abcd", stop_ids=frozenset({ord("c")}), ignore_eos=True, max_new_tokens=6)
    assert (ignoring.text, ignoring.tokens, ignoring.finish_reason) == ("abcd", (*b"abcd", 257, 257), "length")
    stopped, _ = told("abcd", ignore_eos=True, stop_strings=["d"])
    assert (stopped.text, stopped.finish_reason) == ("abc", "stop")


def test_run_text_as_json() -> None:
    result, _ = told("abc")
    value = result.as_json()
    assert json.loads(json.dumps(value)) == value
    assert list(value) == ["text", "tokens", "prompt_tokens", "finish_reason", "timings", "pauses"]
    assert set(value["timings"]) == {
        *("prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s")
    }
    assert all(0 <= seconds < float("inf") for seconds in value["timings"].values())
    assert value["timings"]["first_token_s"] >= value["timings"]["prefill_s"]


def test_run_text_bad_prompts() -> None:
    with pytest.raises(BadInput, match="prompt is empty"):
        run_text(FakeExecutor(), ByteTokenizer(), "", max_new_tokens=1)
    with pytest.raises(BadInput, match="66 tokens, max_seq_len is 64"):
        run_text(FakeExecutor(), ByteTokenizer(), "x" * 65, max_new_tokens=1)
