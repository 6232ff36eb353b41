from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hashed_model import VOCAB, expected_greedy, hashed_logits
from serving import WAIT_S, FakeExecutor, Letters, Listener, Rows, letter

from v4export.errors import BadInput, NotEnough
from v4export.runtime.generate import generate
from v4export.runtime.pausing import Pausing, Thought
from v4export.runtime.sampling import Sampler, Sampling
from v4export.serve.answer import Cancelled, Closed, QueueFull, Request
from v4export.serve.limits import Limits
from v4export.serve.scheduler import Scheduler


def prompts(count: int, longest: int = 20) -> list[tuple[int, ...]]:
    random = np.random.default_rng(count)
    return [tuple(random.integers(0, VOCAB, random.integers(1, longest + 1)).tolist()) for _ in range(count)]


def asked(prompt=(1, 2, 3), most: int = 10, **options) -> Request:
    return Request(tuple(prompt), most, **options)


def serve(executor=None, **limits) -> Scheduler:
    return Scheduler(executor or FakeExecutor(), Letters(), Limits(**limits))


class Gate:
    """Holds the executor back before every step until it is let go on."""

    def __init__(self) -> None:
        self.arrived, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, *_) -> None:
        self.arrived.release()
        assert self.go.acquire(timeout=WAIT_S)

    def step(self, steps: int = 1) -> None:
        """So many steps; afterwards the next one waits."""
        for _ in range(steps):
            self.go.release()
            assert self.arrived.acquire(timeout=WAIT_S)

    def open(self) -> None:
        self.go.release(10_000)


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_each_of_many_gets_what_it_would_get_alone(slots, chunk):
    given = prompts(20)
    with serve(slots=slots, chunk=chunk) as scheduler:
        heard = [Listener() for _ in given]
        for i, (prompt, listener) in enumerate(zip(given, heard, strict=True)):
            scheduler.submit(asked(prompt, 1 + 2 * i), listener)
        found = [listener.wait() for listener in heard]
    assert [one.tokens for one in found] == [expected_greedy(p, 1 + 2 * i) for i, p in enumerate(given)]
    assert {one.reason for one in found} == {"length"} and all(one.error is None for one in found)
    assert [one.text for one in found] == ["".join(map(letter, one.tokens)) for one in found]
    assert [(one.usage.prompt_tokens, one.usage.new_tokens) for one in found] == [
        (len(p), 1 + 2 * i) for i, p in enumerate(given)
    ]


def test_steps_are_shared():
    """Eight answers of thirty tokens take about thirty steps, not two hundred and forty."""
    executor, gate = FakeExecutor(), Gate()
    executor.before = gate
    with serve(executor, slots=8) as scheduler:
        heard = [Listener() for _ in range(8)]
        for listener in heard:
            scheduler.submit(asked(most=30), listener)
        gate.open()
        assert all(listener.wait().tokens == expected_greedy((1, 2, 3), 30) for listener in heard)
    decodes = [step for step in executor.steps if step[0] == 8]
    assert len(decodes) < 40 and max(busy for _, busy, _ in decodes) == 8


def test_a_long_prompt_is_read_between_the_tokens_of_others():
    executor, gate = FakeExecutor(max_seq_len=1000), Gate()
    executor.before = gate
    with serve(executor, slots=2, chunk=10) as scheduler:
        short, long = Listener(), Listener()
        scheduler.submit(asked(most=40), short)
        assert gate.arrived.acquire(timeout=WAIT_S)
        scheduler.submit(asked([5] * 95, 2), long)
        gate.open()
        assert short.wait().tokens == expected_greedy((1, 2, 3), 40)
        assert long.wait().tokens == expected_greedy([5] * 95, 2)
    widths = [width for batch, _, width in executor.steps if batch == 1]
    assert widths == [3, *[10] * 9, 5]
    kinds = "".join("r" if batch == 1 else "d" for batch, *_ in executor.steps)
    assert "rr" not in kinds and kinds.startswith("rdrdrdrd")


def test_sampling_is_each_request_s_own():
    """The random numbers of a request do not depend on what else is served."""
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    alone = [e.tokens_B[0] for e in generate(FakeExecutor(), [(1, 2)], max_new_tokens=12, sampler=Sampler(sampling))]
    with serve(slots=4) as scheduler:
        heard = [Listener() for _ in range(9)]
        for i, listener in enumerate(heard):
            mine = sampling if i % 3 else replace(sampling, seed=i + 100)
            scheduler.submit(asked((1, 2), 12, sampling=mine), listener)
        found = [listener.wait().tokens for listener in heard]
    assert [tokens == alone for tokens in found] == [bool(i % 3) for i in range(9)]


def test_stop_ids_and_stop_strings():
    tokens = expected_greedy((1, 2, 3), 10)
    with serve() as scheduler:
        by_id, by_text, held = Listener(), Listener(), Listener()
        scheduler.submit(asked(stop_ids=frozenset({tokens[4]})), by_id)
        scheduler.submit(asked(stop_strings=(letter(tokens[2]) + letter(tokens[3]),)), by_text)
        scheduler.submit(asked(stop_strings=(letter(tokens[9]) + "x",)), held)
        for listener in (by_id, by_text, held):
            listener.wait()
    assert (by_id.tokens, by_id.reason, by_id.text) == (tokens[:5], "stop", "".join(map(letter, tokens[:4])))
    assert (by_text.tokens, by_text.reason, by_text.text) == (tokens[:4], "stop", "".join(map(letter, tokens[:2])))
    assert (held.reason, held.text) == ("length", "".join(map(letter, tokens)))  # what was held back comes at the end


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (asked(()), "prompt is empty"),
        (asked(most=0), "max_tokens is too small"),
        (asked([1] * 60, 5), "60 and 5, at most 64 together"),
        (asked(stop_strings=("",)), "stop string is empty"),
    ],
)
def test_requests_that_cannot_be_answered(request_, match):
    with serve() as scheduler:
        with pytest.raises(BadInput, match=match):
            scheduler.submit(request_, Listener())
        fits = Listener()
        scheduler.submit(asked([1] * 60, 4), fits)
        assert fits.wait().tokens == expected_greedy([1] * 60, 4)


@pytest.mark.parametrize("name", ["slots", "queue", "chunk"])
def test_limits(name):
    with pytest.raises(BadInput, match=f"{name} = 0"):
        Limits(**{name: 0})


def test_a_cancelled_request_frees_its_row_within_a_step():
    executor, gate = FakeExecutor(max_seq_len=1000), Gate()
    executor.before = gate
    with serve(executor, slots=1) as scheduler:
        first, second = Listener(), Listener()
        answer = scheduler.submit(asked(most=900), first)
        scheduler.submit(asked((9,), 2), second)
        assert gate.arrived.acquire(timeout=WAIT_S)
        gate.step(5)
        before = len(first.tokens)
        answer.cancel()
        gate.step(1)  # the step that had begun
        assert isinstance(first.error, Cancelled) and len(first.tokens) == before + 1
        gate.open()
        assert second.wait().tokens == expected_greedy((9,), 2)
    assert scheduler.metrics.values()["cancelled"] == 1


def test_who_reads_or_waits_can_be_cancelled_too():
    executor, gate, gone = FakeExecutor(max_seq_len=1000), Gate(), threading.Event()
    executor.before = gate
    with serve(executor, slots=1, queue=1, chunk=10) as scheduler:
        reads, waits, late = Listener(), Listener(), Listener()
        answer = scheduler.submit(asked([4] * 100, 5), reads)
        assert gate.arrived.acquire(timeout=WAIT_S)
        scheduler.submit(asked(), waits, gone.is_set)
        with pytest.raises(QueueFull, match="1 requests wait"):
            scheduler.submit(asked(), Listener())
        gone.set()
        scheduler.submit(asked(most=3), late)  # the queue is full of one that nobody wants
        assert isinstance(waits.wait().error, Cancelled)
        answer.cancel()
        gate.open()
        assert isinstance(reads.wait().error, Cancelled) and not reads.tokens
        assert late.wait().tokens == expected_greedy((1, 2, 3), 3)
    values = scheduler.metrics.values()
    assert (values["refused"], values["cancelled"], values["prompt_tokens"]) == (1, 2, 10 + 3)


def test_who_cannot_be_asked_whether_it_is_cancelled_is():
    def gone() -> bool:
        raise OSError("nobody there")

    with serve(slots=2) as scheduler:
        lost, fine = Listener(), Listener()
        scheduler.submit(asked(most=50), lost, gone)
        scheduler.submit(asked(), fine)
        assert isinstance(lost.wait().error, Cancelled)
        assert fine.wait().tokens == expected_greedy((1, 2, 3), 10)


def test_an_error_of_one_request_is_its_own():
    """A prompt that cannot be read, a listener that is gone, a prediction that is no number."""

    def fail(tokens_BS, state):
        if 77 in tokens_BS[0].tolist() and state.of == 1:
            raise NotEnough("no room for this prompt")

    def leave(piece):
        raise OSError("nobody there")

    with serve(FakeExecutor(before=fail), slots=3) as scheduler:
        unread, left, fine = Listener(), Listener(leave), Listener()
        scheduler.submit(asked((77,)), unread)
        scheduler.submit(asked(), left)
        scheduler.submit(asked(most=20), fine)
        assert fine.wait().tokens == expected_greedy((1, 2, 3), 20)
        assert isinstance(unread.wait().error, NotEnough) and isinstance(left.wait().error, OSError)
        assert len(left.tokens) == 1
    assert scheduler.metrics.values()["failed"] == 2


def test_a_failure_of_the_executor_ends_what_is_on_its_way_and_no_more():
    executor = FakeExecutor()
    broken, begun = threading.Event(), threading.Semaphore(0)

    def fail(tokens_BS, state):
        if broken.is_set() and state.of > 1:
            broken.clear()
            raise RuntimeError("the device is gone")

    def at(piece):
        begun.release()
        if len(first.tokens) == 5:
            broken.set()

    executor.before = fail
    first, second = Listener(at), Listener()
    with serve(executor, slots=2) as scheduler:
        scheduler.submit(asked(most=50), first)
        assert isinstance(first.wait().error, RuntimeError)
        scheduler.submit(asked((8, 8), 6), second)
        assert second.wait().tokens == expected_greedy((8, 8), 6)


def test_an_executor_that_cannot_be_gone_on_with_closes(monkeypatch):
    """Without memory for another batch nobody waits for ever."""
    executor, heard = FakeExecutor(), [Listener(), Listener()]

    def fail(tokens_BS, state):
        if state.of > 1:
            executor.new_state = no_room
            raise RuntimeError("the device is gone")

    def no_room(batch=1):
        raise MemoryError("no room")

    executor.before = fail
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    scheduler = serve(executor, slots=2)
    scheduler.submit(asked(), heard[0])
    assert isinstance(heard[0].wait().error, RuntimeError)
    scheduler._thread.join(WAIT_S)
    with pytest.raises(Closed):
        scheduler.submit(asked(), heard[1])
    assert told[0].exc_type is MemoryError


def test_closing_ends_what_is_on_its_way():
    executor, gate = FakeExecutor(max_seq_len=1000), Gate()
    executor.before = gate
    scheduler = serve(executor, slots=1)
    heard = [Listener() for _ in range(3)]
    for listener in heard:
        scheduler.submit(asked(most=900), listener)
    assert gate.arrived.acquire(timeout=WAIT_S)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._closing:
        time.sleep(0.001)
    gate.open()
    closing.join(WAIT_S)
    assert all(isinstance(listener.wait().error, Closed) for listener in heard)
    with pytest.raises(Closed, match="closing"):
        scheduler.submit(asked(), Listener())


class Thinking(FakeExecutor):
    """Thoughts add their number of steps to the likeliest token; of every thought, who held what is kept."""

    def step(self, *args, **options):
        logits = super().step(*args, **options)
        self.trunk = np.nan_to_num(logits.argmax(-1)[..., None].astype(np.float32))
        return logits

    def think(self, trunk_BQD, state, *, at_BQ=None, steps=None, looped=False):
        token_B = (trunk_BQD[:, 0, 0].astype(int) + (steps or 3)) % VOCAB
        logits = np.eye(VOCAB, dtype=np.float32)[token_B][:, None]
        return Thought(logits, np.ones((len(token_B), 1), np.float32), np.zeros((len(token_B), 1, 1), np.int64))


def expected_thoughts(prompt, count, steps) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append((int(hashed_logits(history).argmax()) + steps) % VOCAB)
    return history[len(prompt) :]


def test_each_thinks_as_it_was_asked_to():
    ways = [
        (None, 0),
        (Pausing(steps=2, always=True), 2),
        (Pausing(steps=1, always=True), 1),
        (Pausing(threshold=0), 3),
    ]
    with serve(Thinking(), slots=4) as scheduler:
        heard = [Listener() for _ in ways]
        for (pausing, _), listener in zip(ways, heard, strict=True):
            scheduler.submit(asked(most=8, pausing=pausing), listener)
        found = [listener.wait() for listener in heard]
    assert [one.tokens for one in found] == [expected_thoughts((1, 2, 3), 8, steps) for _, steps in ways]
    assert [one.usage.thoughts for one in found] == [0, 8, 8, 8]
    assert scheduler.metrics.values()["thoughts"] == 24


def test_what_is_counted():
    with serve(slots=2) as scheduler:
        heard = [Listener() for _ in range(3)]
        for listener in heard:
            scheduler.submit(asked(most=5), listener)
        for listener in heard:
            listener.wait()
    values = scheduler.metrics.values()
    wanted = {"prompt_tokens": 9, "new_tokens": 15, "first_tokens": 3, "token_intervals": 12, "finished": 3}
    assert {name: values[name] for name in wanted} == wanted
    assert values["running"] == values["waiting"] == values["failed"] == 0
    assert values["first_token_seconds"] >= values["queue_seconds"] > 0 and values["token_interval_seconds"] > 0


def test_few_answers_are_a_small_batch():
    """A step has the rows up to the last that is taken; one that is free among them holds nothing."""
    executor, seen, sizes = FakeExecutor(), [], (30, 4, 30)
    gate = Gate()

    def look(tokens_BS, state: Rows):
        if state.of > 1:
            seen.append((len(tokens_BS), [len(row) > 0 for row in state.rows]))
        gate()

    executor.before = look
    with serve(executor, slots=6) as scheduler:
        heard = [Listener() for _ in sizes]
        for most, listener in zip(sizes, heard, strict=True):
            scheduler.submit(asked(most=most), listener)
        gate.open()
        for listener, most in zip(heard, sizes, strict=True):
            assert listener.wait().tokens == expected_greedy((1, 2, 3), most)
    assert seen[0] == (1, [True]) and max(count for count, _ in seen) == 3
    assert (3, [True, False, True]) in seen and (3, [True, True, True]) in seen
