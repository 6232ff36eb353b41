"""Runs prompts through an executor, prefill in chunks and then token by token, and keeps every layer boundary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from v4export.config import ModelConfig
from v4export.graphs.stamp import (
    candidates_name,
    engram_name,
    experts_name,
    hidden_name,
    new_state_name,
    selected_name,
    shares_name,
)
from v4export.runtime.generate import Executor
from v4export.runtime.pausing import Thought
from v4export.runtime.state import State
from v4export.state_contract import state_tensors


class TappedExecutor(Executor, Protocol):
    """An executor that also returns values from inside the graph."""

    tapped: dict[str, np.ndarray]
    draft_tapped: dict[str, np.ndarray]


@dataclass(frozen=True)
class Thinking:
    """Thoughts about all n tokens of a sequence, of K steps.

    Attributes:
        looped: whether they were run a step at a time.
        hidden: by step from 1 and layer: float32 [n, D].
        tokens: that were thought, int64 [n, K - 2].
        weight: float32 [n].
        logits: of the mixed predictions, float32 [n, V].
    """

    looped: bool
    hidden: dict[tuple[int, int], np.ndarray]
    tokens: np.ndarray
    weight: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Recording:
    """What n tokens of one sequence left at every boundary.

    Attributes:
        tokens: int64 [n], the prompt and the tokens that were decoded after it.
        before: int64, tokens that were only remembered ahead of them, without passing the decoder.
        held: by layer and name, what the graph then held of each state tensor, float32 [rows, W], rings as they are.
        hidden: by layer, -1 the embedding: float32 [n, D], or [n, X, D] with hyper-connections.
        experts: by routed layer: int64 [n, K].
        selected: by layer with an indexer: int64 [n, K], -1 for none; K is the largest of all steps.
        candidates: by layer that keeps blocks of entries for others: the same of blocks.
        pre: by layer, -1 the embedding, where single-pass: shares of the streams, float32 [n, X].
        engram: by layer with Engram: what was looked up for it, float32 [n, W] or int64 numbers of rows [n, K].
        state: by layer and name: the rows that can still be seen, oldest first, float32 [rows, W].
        rows: by layer and name, of windows of E4M3: the rows of all n tokens, float32 [n, W].
        logits: float32 [n, V].
        trunk: what thoughts start from, float32 [n, D], of a model that thinks.
        thinking: thoughts in both forms, of a model that thinks.
        features: what drafts go on from, float32 [n, D] or [n, X, D], of a model that drafts.
        draft: of such a model, the layer that drafts as a model of its own: fed each token but the first, with the
            features of the one before.
        given: of such a layer, these features.
    """

    tokens: np.ndarray
    before: np.ndarray
    held: dict[tuple[int, str], np.ndarray]
    hidden: dict[int, np.ndarray]
    experts: dict[int, np.ndarray]
    selected: dict[int, np.ndarray]
    candidates: dict[int, np.ndarray]
    pre: dict[int, np.ndarray]
    engram: dict[int, np.ndarray]
    state: dict[tuple[int, str], np.ndarray]
    rows: dict[tuple[int, str], np.ndarray]
    logits: np.ndarray
    trunk: np.ndarray | None = None
    thinking: tuple[Thinking, ...] = ()
    features: np.ndarray | None = None
    draft: Recording | None = None
    given: np.ndarray | None = None


def _recorded(config: ModelConfig) -> dict[str, tuple[Callable[[int], str], list[int]]]:
    """What is recorded: by field of ``Recording``, how its values are called in the graph, and of which layers."""
    c, layers = config.compressed, range(config.num_layers)
    shared = c.shared if c else None
    single_pass = config.hyper is not None and config.hyper.single_pass
    return {
        "hidden": (hidden_name, [-1, *layers]),
        "experts": (experts_name, list(config.moe_layers)),
        "selected": (selected_name, [i for i in layers if config.has_indexer(i)]),
        "candidates": (candidates_name, [i for i in layers if shared and shared.keeps_candidates(i)]),
        "pre": (shares_name, [-1, *layers] if single_pass else []),
        "engram": (engram_name, [i for i in layers if config.has_engram(i)]),
    }


def tap_names(config: ModelConfig) -> list[str]:
    """The values inside the graph that a recording needs; what is looked up, the executor itself gives to it."""
    fields = _recorded(config)
    names = [name(i) for field, (name, layers) in fields.items() if field != "engram" for i in layers]
    return names + [new_state_name(*place) for place in recorded_rows(config)]


def draft_tap_names(config: ModelConfig) -> list[str]:
    """The same inside the graph that drafts, whose layer is numbered behind the model's; none where there is none."""
    return [*_in_drafts(config)] if config.drafts else []


def _in_drafts(config: ModelConfig) -> dict[str, str]:
    """What is recorded of the layer that drafts, as its graph calls it, and as that of a model of its own would."""
    own, behind = config.drafter, config.num_layers
    fields = {name(behind + i): name(i) for name, layers in _recorded(own).values() for i in layers}
    return fields | {new_state_name(behind + i, name): new_state_name(i, name) for i, name in recorded_rows(own)}


def recorded_rows(config: ModelConfig) -> list[tuple[int, str]]:
    """Layer and name of the state tensors every row of which is recorded: those read rounded that are not all kept."""
    layers = range(config.num_layers if config.state_fp8 else 0)
    return [(i, t.name) for i in layers for t in state_tensors(config, i) if t.rows == "window"]


def record(
    executor: TappedExecutor,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int,
    decode: int,
    remembered: int = 0,
) -> list[Recording]:
    """Run prompts as one batch: prefill in chunks of ``chunk`` tokens, then decode ``decode`` tokens greedily.

    The first ``remembered`` tokens of each do not pass the decoder, and are not recorded.
    """
    B = len(prompts)
    state = executor.new_state(B)
    before, prompts = [prompt[:remembered] for prompt in prompts], [prompt[remembered:] for prompt in prompts]
    for start in range(0, remembered, chunk):
        pieces = np.array([prompt[start : start + chunk] for prompt in before], np.int64)
        executor.remember(pieces, state)
    held = [_held(config, state, b) for b in range(B)]
    tokens = [list(prompt) for prompt in prompts]
    kept: list[dict[str, list[np.ndarray]]] = [{} for _ in prompts]

    def run(pieces: Sequence[Sequence[int]]) -> None:
        lengths_B = np.array([len(piece) for piece in pieces])
        S = int(lengths_B.max())
        ids_BS = np.zeros((B, S), np.int64)
        for b, piece in enumerate(pieces):
            ids_BS[b, : len(piece)] = piece
        every_BS = np.broadcast_to(np.arange(S), (B, S))
        logits = executor.step(ids_BS, state, logits_at_BQ=every_BS, lengths_B=lengths_B)
        said = {"logits": logits} if executor.trunk is None else {"logits": logits, "trunk": executor.trunk}
        if config.drafts:
            assert executor.features is not None
            said["features"] = executor.features
        _keep(kept, lengths_B, {**executor.tapped, **{n: v.reshape(B * S, *v.shape[2:]) for n, v in said.items()}})

    for start in range(0, max(map(len, prompts)), chunk):
        run([prompt[start : start + chunk] for prompt in prompts])
    for _ in range(decode):
        for row, values in zip(tokens, kept, strict=True):
            newest = next(v for v in reversed(values["logits"]) if len(v))
            row.append(int(newest[-1].argmax()))
        run([row[-1:] for row in tokens])
    ends = [_rows(config, state, b) for b in range(B)]
    found = [_recording(config, tokens[b], before[b], held[b], kept[b], ends[b]) for b in range(B)]
    if config.drafts:
        return _with_drafts(executor, config, found, chunk, decode)
    return _with_thoughts(executor, found, state) if config.thinks else found


def _keep(kept: Sequence[dict[str, list[np.ndarray]]], lengths_B: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
    """Take what a step of several sequences had of each, [B*S, ..], by name."""
    for name, value in values.items():
        rows = value.reshape(len(kept), len(value) // len(kept), *value.shape[1:])
        for b, length in enumerate(lengths_B):
            # A copy: a view would keep what other sequences were padded with.
            kept[b].setdefault(name, []).append(rows[b, :length].copy())


def _with_drafts(
    executor: TappedExecutor, config: ModelConfig, found: Sequence[Recording], chunk: int, decode: int
) -> list[Recording]:
    """The same with what is drafted: of all tokens but the last of each, in chunks and then one by one."""
    B, own, called = len(found), config.drafter, _in_drafts(config)
    state, dtype = executor.new_draft_state(B), executor.features.dtype  # type: ignore[union-attr]
    held = [_held(own, state, b) for b in range(B)]
    kept: list[dict[str, list[np.ndarray]]] = [{} for _ in found]
    most = max(len(one.tokens) for one in found) - 1
    starts = [*range(0, most - decode, chunk), *range(max(most - decode, 0), most)]
    for start, end in zip(starts, [*starts[1:], most], strict=True):
        lengths_B = np.array([np.clip(len(one.tokens) - 1 - start, 0, end - start) for one in found])
        tokens_BS = np.zeros((B, end - start), np.int64)
        given = np.zeros((B, end - start, *config.hidden_shape), dtype)
        for b, (one, length) in enumerate(zip(found, lengths_B, strict=True)):
            assert one.features is not None
            tokens_BS[b, :length] = one.tokens[start + 1 : start + 1 + length]
            given[b, :length] = one.features[start : start + length].astype(dtype)
        every = np.broadcast_to(np.arange(end - start), tokens_BS.shape)
        logits, handed = executor.draft(tokens_BS, given, state, logits_at_BQ=every, lengths_B=lengths_B)
        said = {"logits": logits, "features": handed}
        values = {n: v.reshape(-1, *v.shape[2:]) for n, v in said.items()}
        _keep(kept, lengths_B, values | {called[n]: v for n, v in executor.draft_tapped.items()})
    ends = [_rows(own, state, b) for b in range(B)]
    drafted = []
    for one, *rest in zip(found, held, kept, ends, strict=True):
        assert one.features is not None
        draft = _recording(own, one.tokens[1:].tolist(), [], *rest)  # type: ignore[arg-type]
        drafted.append(replace(one, draft=replace(draft, given=one.features[:-1])))
    return drafted


def _with_thoughts(executor: TappedExecutor, found: Sequence[Recording], state: State) -> list[Recording]:
    """The same with thoughts about every token that was recorded, side by side."""
    trunks = [one.trunk for one in found if one.trunk is not None]
    longest = max(map(len, trunks))
    # Sequences that are shorter have their first token thought about again.
    at_BQ = np.array([[t if t < len(trunk) else 0 for t in range(longest)] for trunk in trunks], np.int64)
    trunk_BQD = np.stack([trunk[at] for trunk, at in zip(trunks, at_BQ, strict=True)])
    at_BQ += np.array([[len(one.before)] for one in found])
    forms = {looped: executor.think(trunk_BQD, state, at_BQ=at_BQ, looped=looped) for looped in (False, True)}
    return [
        replace(one, thinking=tuple(_thinking(looped, thought, b, len(trunk)) for looped, thought in forms.items()))
        for b, (one, trunk) in enumerate(zip(found, trunks, strict=True))
    ]


def _thinking(looped: bool, thought: Thought, b: int, n: int) -> Thinking:
    """Of thoughts about several sequences, those about the first ``n`` positions of one."""
    B = len(thought.weight)
    hidden = {place: v.reshape(B, -1, v.shape[-1])[b, :n].astype(np.float32) for place, v in thought.hidden.items()}
    return Thinking(looped, hidden, thought.tokens[b, :n], thought.weight[b, :n], thought.logits[b, :n])


def _held(config: ModelConfig, state: State, b: int) -> dict[tuple[int, str], np.ndarray]:
    """Every state tensor of a sequence as the graph reads it."""
    return {
        (i, t.name): (buffer := state.layers[i][t.name])
        .array[b, : buffer.array.shape[1] if t.ring else t.complete(int(state.lengths_B[b]))]
        .astype(np.float32)
        for i in range(config.state_layers)
        for t in state_tensors(config, i)
    }


def _rows(config: ModelConfig, state: State, b: int) -> dict[tuple[int, str], np.ndarray]:
    """Its rows that can still be seen."""
    layers = range(config.state_layers)
    return {(i, t.name): state.rows(i, t.name, b).astype(np.float32) for i in layers for t in state_tensors(config, i)}


def _recording(
    config: ModelConfig,
    tokens: Sequence[int],
    before: Sequence[int],
    held: dict[tuple[int, str], np.ndarray],
    pieces: dict[str, list[np.ndarray]],
    rows: dict[tuple[int, str], np.ndarray],
) -> Recording:
    found: dict[str, Any] = {}
    for field, (name, which) in _recorded(config).items():
        # What is no longer needed in pieces is dropped.
        found[field] = {i: _JOINED.get(field, _narrow)(pieces.pop(name(i))) for i in which}
    ids, earlier = (np.array(some, np.int64) for some in (tokens, before))
    trunk, features = (_narrow(pieces[name]) if name in pieces else None for name in ("trunk", "features"))
    every = {place: _narrow(pieces.pop(new_state_name(*place))) for place in recorded_rows(config)}
    logits = np.concatenate(pieces["logits"])
    return Recording(ids, earlier, held, **found, state=rows, rows=every, logits=logits, trunk=trunk, features=features)


def _narrow(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pieces one below the other; floats as float32."""
    joined = np.concatenate(pieces)
    return joined if joined.dtype == np.int64 else joined.astype(np.float32, copy=False)


def _widest(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pieces [n, K] of different K one below the other; a step selects no more than there is."""
    width = max(piece.shape[1] for piece in pieces)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in pieces])


_JOINED = {"selected": _widest, "candidates": _widest}
