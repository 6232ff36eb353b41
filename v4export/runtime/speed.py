"""How fast a bundle runs here: a prompt and tokens after it, as llama-bench measures them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from v4export.errors import BadInput
from v4export.runtime.drafting import Drafting
from v4export.runtime.generate import Executor, generate
from v4export.runtime.sampling import Sampler, Sampling

#: Prompt tokens of a step, as in ``generate``.
CHUNK = 512
_WARM_UP = 16


#: Percentiles of latencies.
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Floor:
    """What no decoded token can be faster than: reading all that it has to read, at the measured bandwidth.

    Attributes:
        weights: bytes of them that a token reads.
        state: bytes of cached rows that it reads, on average over the steps that were measured.
        bandwidth: bytes a second.
    """

    weights: float
    state: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        """Of one token."""
        return (self.weights + self.state) / self.bandwidth


@dataclass(frozen=True)
class Drafted:
    """The same prompts once more, with drafts.

    Attributes:
        most: tokens drafted ahead of a step.
        drafted, accepted: tokens, of all repetitions.
        decode_s: seconds of each repetition from its first new token to the last.
        plain_s: the same without drafts.
        same: whether all tokens were those that come without.
    """

    most: int
    drafted: int
    accepted: int
    decode_s: tuple[float, ...]
    plain_s: tuple[float, ...]
    same: bool

    @property
    def acceptance(self) -> float:
        """Which part of the drafts was right."""
        return self.accepted / max(self.drafted, 1)

    @property
    def speed_up(self) -> float:
        """How many times as fast new tokens came as without drafts."""
        return sum(self.plain_s) / sum(self.decode_s)


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        prompt_tokens, new_tokens: of a repetition.
        prefill_s: seconds of each repetition's prompt, to the logits of its first new token.
        steps_s: seconds of each step after that, of all repetitions.
        drafts: what drafts made of it, where there were any.
        peak_mib: peak memory of the process, mapped pages of weights included; 0 where it was not asked for.
        floor: of a decoded token; None where it is not known.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: tuple[float, ...]
    steps_s: tuple[float, ...]
    drafts: Drafted | None = None
    peak_mib: float = 0.0
    floor: Floor | None = None

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """Tokens a second, mean and standard deviation over repetitions, by llama-bench's names of tests."""
        steps, decodes = self.new_tokens - 1, _decodes(self.steps_s, self.new_tokens)
        return {
            f"pp{self.prompt_tokens}": _spread([self.prompt_tokens / s for s in self.prefill_s]),
            **({f"tg{self.new_tokens}": _spread([steps / s for s in decodes])} if decodes else {}),
        } | self._drafted_rate()

    def _drafted_rate(self) -> dict[str, tuple[float, float]]:
        d, steps = self.drafts, self.new_tokens - 1
        return {f"tg{self.new_tokens}+{d.most}": _spread([steps / s for s in d.decode_s])} if d else {}

    @property
    def latencies(self) -> dict[str, dict[str, float]]:
        """Seconds to the first token, and for each one after it: what half of them, nine in ten, and 99 in a hundred
        stay under.
        """
        named = {"TTFT": self.prefill_s, "TPOT": self.steps_s}
        return {
            name: {f"p{percent}": float(np.percentile(s, percent)) for percent in PERCENTILES}
            for name, s in named.items()
            if s
        }

    @property
    def of_floor(self) -> float | None:
        """The floor's share of the median time of a decoded token: 1 is as fast as memory can be read."""
        return self.floor.seconds / self.latencies["TPOT"]["p50"] if self.floor and self.steps_s else None


def measure(
    executor: Executor,
    vocabulary: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    drafting: Drafting | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Speed:
    """Run random prompts, and the likeliest tokens after them; a short run ahead is not counted.

    With ``drafting``, each is run once more with drafts. ``advance`` is told the tokens that were just run, in all
    ``repetitions`` times both numbers, and as many again with drafts.

    Raises:
        BadInput: the executor holds fewer tokens, or a number is below 1.
    """
    if min(prompt_tokens, new_tokens, repetitions) < 1:
        raise BadInput("there is nothing to measure", f"{prompt_tokens} + {new_tokens} tokens, {repetitions} times")
    if prompt_tokens + new_tokens - 1 > executor.max_seq_len:
        raise BadInput(
            "prompt and new tokens are longer than the bundle was built for",
            f"{prompt_tokens} + {new_tokens} tokens, max_seq_len is {executor.max_seq_len}",
            "give smaller -p and -n, or build with a larger --max-seq-len",
        )
    draw = np.random.default_rng(0)
    warm = draw.integers(0, vocabulary, min(prompt_tokens, _WARM_UP))
    _run(executor, warm, min(new_tokens, 2), lambda _: None)
    if drafting and new_tokens > 1:
        _drafted(executor, warm, min(new_tokens, 2 + drafting.most), Drafting(drafting.most))
    prefills: list[float] = []
    steps: list[float] = []
    decodes: list[float] = []
    same = True
    for _ in range(repetitions):
        prompt = draw.integers(0, vocabulary, prompt_tokens)
        (first, *rest), tokens = _run(executor, prompt, new_tokens, advance)
        prefills.append(first)
        steps += rest
        if drafting and new_tokens > 1:
            seconds, drafted = _drafted(executor, prompt, new_tokens, drafting)
            decodes.append(seconds)
            same &= drafted == tokens
            advance(prompt_tokens + new_tokens)
    drafts = None
    if drafting and decodes:
        counts = (drafting.most, drafting.drafted, drafting.accepted)
        drafts = Drafted(*counts, tuple(decodes), tuple(_decodes(steps, new_tokens)), same)
    return Speed(prompt_tokens, new_tokens, tuple(prefills), tuple(steps), drafts)


def _drafted(executor: Executor, prompt: np.ndarray, new_tokens: int, drafting: Drafting) -> tuple[float, list[int]]:
    """Seconds from the first new token to the last, and all of them."""
    how = {"max_new_tokens": new_tokens, "sampler": Sampler(Sampling()), "chunk": CHUNK, "drafting": drafting}
    tokens, start = [], 0.0
    for event in generate(executor, [prompt.tolist()], **how):  # type: ignore[arg-type]
        start = start or time.perf_counter()
        tokens += [token for token in event.tokens_B if token is not None]
    return time.perf_counter() - start, tokens


def _decodes(steps_s: Sequence[float], new_tokens: int) -> list[float]:
    """Seconds of all steps of each repetition."""
    steps = new_tokens - 1
    return [sum(steps_s[i : i + steps]) for i in range(0, len(steps_s), steps)] if steps else []


def _run(
    executor: Executor, prompt: np.ndarray, new_tokens: int, advance: Callable[[float], None]
) -> tuple[list[float], list[int]]:
    """Seconds to each new token from the one before it, and to the first from the beginning; and the tokens."""
    state = executor.new_state(1)
    seconds, tokens, start = [], list[int](), time.perf_counter()
    for at in range(0, len(prompt), CHUNK):
        chunk = prompt[None, at : at + CHUNK]
        last = at + CHUNK >= len(prompt)
        wanted = np.full((1, 1), chunk.shape[1] - 1) if last else np.zeros((1, 0), np.int64)
        logits = executor.step(chunk, state, logits_at_BQ=wanted)
        advance(chunk.shape[1])
    for number in range(new_tokens):
        token = logits[:, -1].argmax(-1)[:, None]
        tokens.append(int(token[0, 0]))
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
        advance(1)
        if number + 1 < new_tokens:
            logits = executor.step(token, state, logits_at_BQ=np.zeros((1, 1), np.int64))
    return seconds, tokens


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
