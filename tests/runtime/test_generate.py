from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hashed_model import VOCAB, expected_greedy, hashed_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export.errors import BadInput, NumbersDiffer
from v4export.runtime.generate import Event, Generation, StopStrings, generate, run_text
from v4export.runtime.pausing import Pause, Pausing, Thought
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.state import Coming
from v4export.runtime.tokenizer import Tokenizer


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
    names = ("text", "tokens", "prompt_tokens", "finish_reason", "timings", "pauses", "drafted", "accepted")
    assert tuple(value) == (*names, "answer", "cached_tokens")
    assert set(value["timings"]) == {
        *("prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s")
    }
    assert all(0 <= seconds < float("inf") for seconds in value["timings"].values())
    assert value["timings"]["first_token_s"] >= value["timings"]["prefill_s"]


def test_run_text_of_a_prompt_that_has_its_special_tokens() -> None:
    for framed in (False, True):
        result = run_text(FakeExecutor(), ByteTokenizer(), "hello", max_new_tokens=1, framed=framed)
        assert result.prompt_tokens == (5 if framed else 6)


def test_run_text_bad_prompts() -> None:
    with pytest.raises(BadInput, match="prompt is empty"):
        run_text(FakeExecutor(), ByteTokenizer(), "", max_new_tokens=1)
    with pytest.raises(BadInput, match="66 tokens, max_seq_len is 64"):
        run_text(FakeExecutor(), ByteTokenizer(), "x" * 65, max_new_tokens=1)


def second_thoughts(history: Sequence[int]) -> np.ndarray:
    """[V], other logits than the plain ones."""
    return hashed_logits([VOCAB, *history])


@dataclass
class ThinkingExecutor(FakeExecutor):
    """A thought starts from the history it is about, and says how long that is; of padding there is none.

    Attributes:
        thought: logits after thinking.
        about: tokens that each thought has.
        asked: steps of each thought.
        refused: whether a thought is an error.
        kept: the last state that was made.
    """

    thought: Callable[[Sequence[int]], np.ndarray] = second_thoughts
    about: tuple[int, ...] = ()
    asked: list[int | None] = field(default_factory=list)
    refused: bool = False
    kept: Any = None

    def new_state(self, batch: int = 1) -> list[list[int]]:
        self.kept = super().new_state(batch)
        return self.kept

    def step(self, tokens_BS: np.ndarray, state: Any, *, logits_at_BQ: np.ndarray, **options: Any) -> np.ndarray:
        before = [len(history) for history in state]
        if self.trunk is not None:
            self.trunk[:] = np.nan  # as though it were written over
        logits_BQV = super().step(tokens_BS, state, logits_at_BQ=logits_at_BQ, **options)
        self.trunk = np.array(before)[:, None, None] + logits_at_BQ[..., None] + 1.0
        self.trunk[np.isnan(logits_BQV[..., 0])] = np.nan
        return logits_BQV

    def think(self, trunk_BQD: np.ndarray, state: Any, *, steps: int | None = None) -> Thought:
        assert not self.refused
        self.asked.append(steps)
        lengths = np.array([len(history) for history in state])[:, None, None]
        assert ((trunk_BQD == lengths) | np.isnan(trunk_BQD)).all()
        logits = np.stack([self.thought(history) for history in state])[:, None]
        tokens = np.array([[[*self.about, len(history)]] for history in state])
        return Thought(np.where(np.isnan(trunk_BQD), np.nan, logits), np.float32(lengths[..., 0] / 8), tokens)


def about(pauses: Iterable[Pause | None]) -> list[tuple[int, tuple[int, ...]] | None]:
    """Which tokens pauses were ahead of, and what was thought."""
    return [pause and (pause.token, pause.tokens) for pause in pauses]


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("steps", [None, 2])
def test_every_token_is_thought_about(chunk: int, steps: int | None) -> None:
    executor, prompts = ThinkingExecutor(), [[1, 2, 3, 4], [5], [6] * 7]
    events = list(
        generate(
            executor, prompts, max_new_tokens=6, sampler=Sampler(Sampling()), chunk=chunk, pausing=Pausing(steps, True)
        )
    )
    histories = [list(prompt) for prompt in prompts]
    for event in events:
        assert about(event.pauses_B) == [(event.step, (len(history),)) for history in histories]
        assert [pause and pause.weight for pause in event.pauses_B] == [len(history) / 8 for history in histories]
        for history in histories:
            history.append(int(second_thoughts(history).argmax()))
    assert rows_of(events)[0] == [history[-6:] for history in histories] and executor.asked == [steps] * 6


def unsure_when_odd(history: Sequence[int]) -> np.ndarray:
    return hashed_logits(history) * (1 if len(history) % 2 else 1000)


@pytest.mark.parametrize("confidence", ["entropy", "margin"])
def test_it_pauses_where_it_is_not_sure(confidence: str) -> None:
    executor = ThinkingExecutor(rule=unsure_when_odd)
    pausing = Pausing(confidence=confidence, threshold=0.9)
    prompts, most = [[1, 2, 3], [4, 5, 6, 7], [8]], 5
    events = list(generate(executor, prompts, max_new_tokens=most, sampler=Sampler(Sampling()), pausing=pausing))
    histories = [list(prompt) for prompt in prompts]
    for event in events:
        odd = [len(history) % 2 == 1 for history in histories]
        assert [pause is not None for pause in event.pauses_B] == odd
        for history, paused in zip(histories, odd, strict=True):
            history.append(int((second_thoughts if paused else unsure_when_odd)(history).argmax()))
    assert rows_of(events)[0] == [history[-most:] for history in histories] and len(executor.asked) == most


def test_a_finished_row_does_not_pause() -> None:
    free = [int(second_thoughts([4]).argmax()), int(second_thoughts([1, 2]).argmax())]
    assert free[0] != free[1]
    options: dict[str, Any] = {"sampler": Sampler(Sampling()), "stop_ids": frozenset(free[:1])}
    events = list(generate(ThinkingExecutor(), [[4], [1, 2]], max_new_tokens=3, pausing=Pausing(None, True), **options))
    assert [about(event.pauses_B) for event in events] == [[(0, (1,)), (0, (2,))], [None, (1, (3,))], [None, (2, (4,))]]


def test_it_does_not_think_unless_asked() -> None:
    executor = ThinkingExecutor(refused=True)
    events = list(generate(executor, [[1], [2, 3]], max_new_tokens=4, sampler=Sampler(Sampling())))
    assert rows_of(events)[0] == [expected_greedy([1], 4), expected_greedy([2, 3], 4)]
    assert [event.pauses_B for event in events] == [(None, None)] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pausing", [Pausing(2, True), Pausing(threshold=3.9)])
def test_thoughts_of_no_weight_change_nothing(pausing: Pausing, temperature: float) -> None:
    """Neither the tokens, nor what the executor is fed, nor the state."""
    seen = []
    for when in (None, pausing):
        executor, sampler = ThinkingExecutor(thought=hashed_logits), Sampler(Sampling(temperature=temperature, seed=5))
        prompts, stop = [[1, 2, 3], [4], [5] * 6], frozenset(range(12))
        events = generate(executor, prompts, max_new_tokens=9, sampler=sampler, stop_ids=stop, chunk=2, pausing=when)
        seen.append((rows_of(events), executor.kept, executor.widths, executor.wanted))
        assert bool(executor.asked) == (when is not None)
    assert seen[0] == seen[1]


def musing(answer: str, thoughts: bytes = b"hm", **options: Any) -> Generation:
    """What is told by one that thinks before every token, and says what it would have said."""
    rule = reciting("hello", answer.encode()).rule
    executor = ThinkingExecutor(max_seq_len=200, rule=rule, vocab=258, thought=rule, about=tuple(thoughts))
    arguments: dict[str, Any] = {"max_new_tokens": 100, "chunk": 3, "pausing": Pausing(4, True), **options}
    return run_text(executor, ByteTokenizer(), "hello", **arguments)


def test_run_text_says_where_it_paused_and_what_it_thought() -> None:
    result = musing("aé")
    assert result.text == "aé" and result.finish_reason == "stop"
    assert [pause.before for pause in result.pauses] == ["a", "\ufffd", "\ufffd", ""]
    # The begin token, five letters, and what was said before.
    assert about(result.pauses) == [(token, (*b"hm", 6 + token)) for token in range(4)]
    assert [pause.text for pause in result.pauses] == ["hm\x06", "hm\x07", "hm\x08", "hm\x09"]
    assert [pause.weight for pause in result.pauses] == [0.75, 0.875, 1.0, 1.125]
    assert musing("aé", pausing=None).pauses == ()


def test_run_text_pauses_where_it_is_not_sure() -> None:
    # One logit of 1 among 258: no token is sure.
    everywhere = musing("abc", pausing=Pausing(threshold=1.0))
    assert [pause.before for pause in everywhere.pauses] == ["a", "b", "c", ""]
    assert musing("abc", pausing=Pausing(threshold=99.0)).pauses == ()


def test_run_text_pauses_end_with_the_text() -> None:
    stopped = musing("one two", stop_strings=["e "])
    assert [pause.before for pause in stopped.pauses] == [*"one "] and stopped.text == "on"
    cut = musing("one two", max_new_tokens=2)
    assert [pause.token for pause in cut.pauses] == [0, 1] and cut.finish_reason == "length"


def test_run_text_pauses_as_json() -> None:
    pauses = json.loads(json.dumps(musing("a").as_json()))["pauses"]
    assert pauses[0] == {"token": 0, "weight": 0.75, "tokens": [*b"hm", 6], "text": "hm\x06", "before": "a"}
    assert [(one["token"], one["before"]) for one in pauses] == [(0, "a"), (1, "")]


def test_pauses_are_json_values() -> None:
    value = musing("a").as_json()
    assert json.loads(json.dumps(value)) == value
