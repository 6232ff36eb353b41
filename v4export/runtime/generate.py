"""The token loop: prompts in, tokens out, over anything that can run the exported graph.

Letters: B rows of the batch, S new tokens, Q positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from v4export.chat.answer import Answer
from v4export.errors import BadInput, NotSupported
from v4export.runtime.drafting import Drafter, Drafting, Drafts
from v4export.runtime.pausing import Pause, Pausing, Thinks, paused
from v4export.runtime.prompt_cache import PromptCache
from v4export.runtime.sampling import Sampler, Sampling
from v4export.runtime.state import Coming
from v4export.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
_SHORTEST_S = 1e-9  # the clock's step; keeps a rate finite


class Executor(Thinks, Drafts, Protocol):
    """What runs the graph.

    Attributes:
        max_seq_len: the most tokens that a row of its state can hold.
        tail: of a model with a decoder, how many of a prompt's last tokens have to pass it; else None.
        trunk: of a model that thinks, what thoughts about the last step's wanted positions start from, [B, Q, D].
    """

    max_seq_len: int
    tail: int | None
    trunk: np.ndarray | None

    def new_state(self, batch: int = 1) -> Any:
        """State that holds no tokens, for ``batch`` rows."""

    def step(
        self,
        tokens_BS: np.ndarray,
        state: Any,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
        commit: bool = True,
    ) -> np.ndarray:
        """Feeds tokens and advances the state in place.

        Args:
            tokens_BS: [B, S] int64. What stands at or after a row's length is padding.
            state: from ``new_state``.
            logits_at_BQ: [B, Q] int64, each in [0, S): the new tokens whose logits are wanted. Q may be 0.
            lengths_B: [B] int64, each in [0, S]: by how many tokens each row advances; None advances all by S.
            coming: the next step's tokens, where they are known, so that what they alone decide can be made ready.
            commit: whether the state advances; if not, ``state.commit`` lets it, by as many tokens as are to be kept.

        Returns:
            [B, Q, V] float32 logits; of a position that is padding, anything.
        """

    def remember(
        self,
        tokens_BS: np.ndarray,
        state: Any,
        *,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> None:
        """The same without the decoder, and so without logits; only where there is a ``tail``."""


@dataclass(frozen=True)
class Event:
    """One new token for each row that still runs, or of drafts for each row that has accepted as many."""

    step: int  # 0 for the first new token
    tokens_B: tuple[int | None, ...]  # None for a row that has none now: mostly one that finished before
    finished_B: tuple[FinishReason | None, ...]  # stop: the token was a stop id; length: no room; None: it runs
    pauses_B: tuple[Pause | None, ...] = ()  # what was thought ahead of it; None where nothing was


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second."""

    prefill_s: float  # from the encoded prompt to the first token
    decode_s: float  # from the first token to the last
    prefill_tokens_per_s: float  # prompt tokens that were computed, over prefill_s
    decode_tokens_per_s: float  # new tokens but the first, over decode_s
    first_token_s: float  # from the call to the first token, encoding included


@dataclass(frozen=True)
class Generation:
    """What one prompt gave."""

    text: str  # new text only, without special tokens, cut before a stop string
    tokens: tuple[int, ...]  # all new tokens, with the one that ended it
    prompt_tokens: int  # how many the prompt had
    finish_reason: FinishReason  # stop: a stop id or stop string; length: no room
    timings: Timings
    pauses: tuple[Pause, ...] = ()  # where it thought, and what
    drafted: int = 0  # tokens that were drafted
    accepted: int = 0  # of them
    answer: Answer | None = None  # of a conversation: the new text as a message
    cached_tokens: int = 0  # tokens of the prompt whose state was in a file, and that were not computed

    def as_json(self) -> dict[str, Any]:
        """The same, as JSON values."""
        return asdict(self) | {
            "tokens": list(self.tokens),
            "pauses": [asdict(one) | {"tokens": list(one.tokens)} for one in self.pauses],
        }


def generate(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: frozenset[int] = frozenset(),
    chunk: int = 512,
    skip_decoder: bool = False,
    pausing: Pausing | None = None,
    drafting: Drafting | None = None,
) -> Iterator[Event]:
    """Generates for a batch of prompts of any lengths, one event a token, until every row has finished.

    A row finishes at a stop id, after ``max_new_tokens``, or when its state is full: the prompt and all new tokens but
    the last, which is never fed, take room.

    Args:
        executor: runs the graph.
        prompts: B prompts, as token ids.
        max_new_tokens: the most new tokens a row gets.
        sampler: picks the tokens.
        stop_ids: tokens that finish their row.
        chunk: the most prompt tokens fed in one step.
        skip_decoder: let all but the last tokens of a prompt pass only the layers before the decoder, which changes the
            result a little.
        pausing: when to think before a token; None is never.
        drafting: how far ahead to draft, which changes no token of a row but by rounding, and, where several rows are
            sampled, by which random number a row gets; it is told what came of it. None drafts nothing.

    Raises:
        NotSupported: the model has no decoder to skip.
        BadInput: a prompt is empty or longer than the executor holds, or a number is below 1. Raised by the call, not
            by the first event.
    """
    for name, value in (("number of prompts", len(prompts)), ("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise BadInput(f"{name} is too small", f"{name} = {value}", "it has to be 1 or more")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise BadInput("a prompt is empty", f"prompt {row} has no tokens", "give at least one token")
        if len(prompt) > executor.max_seq_len:
            raise BadInput(
                "a prompt is longer than the model was built for",
                f"prompt {row} has {len(prompt)} tokens, max_seq_len is {executor.max_seq_len}",
                "shorten the prompt, or build with a larger --max-seq-len",
            )
    if skip_decoder and executor.tail is None:
        why = "it has none, or reasoning layers, which need the last hidden states of every token"
        raise NotSupported("this model has no decoder that prompts could skip", why, "leave --skip-decoder out")
    most = [min(max_new_tokens, executor.max_seq_len - len(prompt) + 1) for prompt in prompts]
    return _loop(executor, prompts, most, sampler, stop_ids, chunk, skip_decoder, pausing, drafting)


def _loop(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    most: list[int],
    sampler: Sampler,
    stop_ids: frozenset[int],
    chunk: int,
    skip_decoder: bool,
    pausing: Pausing | None,
    drafting: Drafting | None,
) -> Iterator[Event]:
    """``generate`` after its checks; ``most`` is how many new tokens each row may get.

    A step is fed each row's last token and the drafts after it, and says what comes after each of them.
    """
    batch = len(prompts)
    state = executor.new_state(batch)
    drafter = Drafter(executor, batch) if drafting else None
    # A step that checks drafts waits to be committed until it is known how many of its tokens count.
    checked: dict[str, Any] = {"commit": False} if drafting else {}
    waits = False
    logits_BQV, trunk_BD, features = _prefill(executor, state, prompts, chunk, skip_decoder, drafter)
    finished: list[FinishReason | None] = [None] * batch
    new: list[list[int]] = [[] for _ in prompts]
    drafts: list[list[int]] = [[] for _ in prompts]
    step = 0
    while True:
        before = [len(tokens) for tokens in new]
        going_B = np.array([reason is None for reason in finished])
        for q in range(logits_BQV.shape[1]):
            logits_BV, pauses_B = paused(executor, state, pausing, logits_BQV[:, q], trunk_BD, going_B, step)
            # A finished row's logits are of padding, where a NaN is no error.
            picked_B = sampler.pick(np.where(going_B[:, None], logits_BV, 0)).tolist()
            tokens_B = tuple(token if goes else None for token, goes in zip(picked_B, going_B, strict=True))
            for row in np.flatnonzero(going_B).tolist():
                new[row].append(picked_B[row])
                if picked_B[row] in stop_ids:
                    finished[row] = "stop"
                elif len(new[row]) == most[row]:
                    finished[row] = "length"
                accepted = drafts[row][q : q + 1] == [picked_B[row]]
                going_B[row] = accepted and finished[row] is None
                if drafting:
                    drafting.accepted += accepted
            yield Event(step, tokens_B, tuple(finished), pauses_B)
            step += 1
            if not going_B.any():
                break
        if all(finished):
            return
        counts_B = np.array([0 if finished[row] else len(new[row]) - before[row] for row in range(batch)])
        if drafting and drafter:
            if waits:
                state.commit(counts_B)
            for row, count in enumerate(counts_B.tolist()):
                drafter.give(row, new[row][len(new[row]) - count :], features[row])
            room = [0 if done else top - len(own) - 1 for done, top, own in zip(finished, most, new, strict=True)]
            drafts = drafter.propose([min(drafting.most, one) for one in room])
            drafting.drafted += sum(map(len, drafts))
        fed = [[tokens[-1], *ahead] for tokens, ahead in zip(new, drafts, strict=True)]
        lengths_B = np.array([0 if done else len(own) for done, own in zip(finished, fed, strict=True)])
        ((tokens_BS, _),) = _chunks(fed, max(map(len, fed)))
        logits_BQV = executor.step(
            tokens_BS,
            state,
            logits_at_BQ=np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape),
            lengths_B=None if (lengths_B == tokens_BS.shape[1]).all() else lengths_B,
            **checked,
        )
        trunk_BD = None if executor.trunk is None else executor.trunk[:, 0]
        features, waits = executor.features if drafting else None, drafting is not None


def _prefill(
    executor: Executor,
    state: Any,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    skip_decoder: bool,
    drafter: Drafter | None,
) -> tuple[np.ndarray, np.ndarray | None, Any]:
    """Feeds the prompts in chunks, also to what drafts.

    Returns:
        Logits [B, 1, V] after each prompt's last token, [B, D], what a thought about it starts from, and [B, 1, ..],
        what drafts go on from.
    """
    longest = max(map(len, prompts))
    cuts = [max(0, len(prompt) - ((skip_decoder and executor.tail) or longest)) for prompt in prompts]
    heads = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
    tails = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
    steps = [(False, *step) for step in _chunks(heads, chunk)] + [(True, *step) for step in _chunks(tails, chunk)]
    following: list[Coming | None] = [(tokens_BS, lengths_B) for _, tokens_BS, lengths_B in steps[1:]]
    left_B = np.array([len(one) for one in tails])
    last_B: list[Any] = [None] * len(prompts)
    trunk_B: list[Any] = [None] * len(prompts)
    features_B: list[Any] = [None] * len(prompts)
    for (is_tail, tokens_BS, lengths_B), coming in zip(steps, [*following, None], strict=True):
        if not is_tail:
            executor.remember(tokens_BS, state, lengths_B=lengths_B, coming=coming)
            continue
        new_B = np.full(len(prompts), tokens_BS.shape[1]) if lengths_B is None else lengths_B
        left_B = left_B - new_B
        ends = np.flatnonzero((left_B == 0) & (new_B > 0))
        logits_at_BQ = np.maximum(new_B - 1, 0)[:, None] if len(ends) else np.zeros((len(prompts), 0), dtype=np.int64)
        logits_BQV = executor.step(tokens_BS, state, logits_at_BQ=logits_at_BQ, lengths_B=lengths_B, coming=coming)
        for row in ends.tolist():
            last_B[row] = np.array(logits_BQV[row, 0])  # a copy: the executor may reuse its output buffer
            trunk_B[row] = None if executor.trunk is None else np.array(executor.trunk[row, 0])
        if drafter and executor.features is not None:
            for row, (tail, left, count) in enumerate(zip(tails, left_B.tolist(), new_B.tolist(), strict=True)):
                end = len(tail) - left
                drafter.give(row, tail[end - count + 1 : end + 1], executor.features[row])
                features_B[row] = np.array(executor.features[row, count - 1 : count]) if count else features_B[row]
            drafter.read()
    return np.stack(last_B)[:, None], None if trunk_B[0] is None else np.stack(trunk_B), features_B


def _chunks(rows: Sequence[Sequence[int]], chunk: int) -> Iterator[Coming]:
    """Rows of tokens side by side, so many of each at a time, padded on the right."""
    lengths_B = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths_B.max())
    tokens_BS = np.zeros((len(rows), longest), dtype=np.int64)
    for b, row in enumerate(rows):
        tokens_BS[b, : len(row)] = row
    for start in range(0, longest, chunk):
        width = min(chunk, longest - start)
        new_B = np.clip(lengths_B - start, 0, width)
        yield tokens_BS[:, start : start + width], None if (new_B == width).all() else new_B


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may yet become one.

    The stop string that is complete first wins, the longer of two that end together, so that the cut does not depend
    on how the text was split into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise BadInput("a stop string is empty", f"stop strings: {list(stops)!r}", "drop it")
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """The text that can be shown now. After a match, ``matched`` is set and the rest is nothing."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.matched, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def run_text(
    executor: Executor,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_strings: Sequence[str] = (),
    stop_ids: frozenset[int] = frozenset(),
    ignore_eos: bool = False,
    chunk: int = 512,
    skip_decoder: bool = False,
    pausing: Pausing | None = None,
    drafting: Drafting | None = None,
    refused_ids: Mapping[int, str] | None = None,
    framed: bool = False,
    prompt_cache: PromptCache | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Completes one text.

    Args (besides those of ``generate``):
        sampling: how tokens are picked; None is greedy.
        stop_strings: the text ends before the first of them.
        stop_ids: tokens that end the text, besides the tokenizer's end token.
        ignore_eos: go on after ``stop_ids`` and the end token; stop strings still count.
        refused_ids: tokens that a prompt may not have, and why.
        framed: whether the prompt has its special tokens already, as those of chat templates have.
        prompt_cache: a file that may hold the beginning of the prompt, and is to hold it afterwards.
        on_text: called with each piece of text as it becomes certain; the pieces joined are the result's text.

    Raises:
        BadInput: the prompt is empty or too long, or an argument is out of range.
    """
    if not prompt:
        raise BadInput("the prompt is empty", "0 characters", "give a text to continue")
    start = time.monotonic()
    ids = tokenizer.encode(prompt, add_special_tokens=not framed)
    for refused, why in (refused_ids or {}).items():
        if refused in ids:
            place = f"token {refused}, number {ids.index(refused)} of the prompt: {why}"
            raise NotSupported("the prompt has a token that is not supported", place, "leave it out")
    ends = tokenizer.ends(stop_ids)
    stops, stream = StopStrings(stop_strings), tokenizer.stream()
    pieces: list[str] = []

    def show(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text:
                on_text(piece)

    cached = prompt_cache.over(executor, ids) if prompt_cache else None
    events = generate(
        cached or executor,
        [ids],
        max_new_tokens=max_new_tokens,
        sampler=Sampler(sampling or Sampling()),
        stop_ids=frozenset() if ignore_eos else ends,
        chunk=chunk,
        skip_decoder=skip_decoder,
        pausing=pausing,
        drafting=drafting,
    )
    tokens: list[int] = []
    pauses: list[Pause] = []
    reason: FinishReason = "length"
    encoded = first = last = time.monotonic()
    for event in events:
        last = time.monotonic()
        first = first if tokens else last
        token = event.tokens_B[0]
        assert token is not None, "the only row runs until the last event"
        tokens.append(token)
        pauses += [_spelt(pause, token, tokenizer) for pause in event.pauses_B if pause]
        reason = event.finished_B[0] or reason
        if event.finished_B[0] != "stop":  # a stop id is a mark, even where it stands for text
            show(stops.push(stream.push(token)))
        if stops.matched:
            break
    show(stops.push(stream.flush()))
    show(stops.flush())
    held = cached.reused if cached else 0
    if cached:
        cached.close()
    return Generation(
        text="".join(pieces),
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        finish_reason="stop" if stops.matched else reason,
        timings=Timings(
            prefill_s=first - encoded,
            decode_s=last - first,
            prefill_tokens_per_s=(len(ids) - held) / max(first - encoded, _SHORTEST_S),
            decode_tokens_per_s=(len(tokens) - 1) / max(last - first, _SHORTEST_S),
            first_token_s=first - start,
        ),
        pauses=tuple(pauses),
        drafted=drafting.drafted if drafting else 0,
        accepted=drafting.accepted if drafting else 0,
        cached_tokens=held,
    )


def _spelt(pause: Pause, token: int, tokenizer: Tokenizer) -> Pause:
    """The same with text."""
    text, before = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (pause.tokens, [token]))
    return replace(pause, text=text, before=before)
