"""Runs prompts through an executor, prefill in chunks and then token by token, and keeps every layer boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from v4export.config import ModelConfig
from v4export.graphs.stamp import experts_name, hidden_name, selected_name
from v4export.runtime.generate import Executor
from v4export.runtime.state import State
from v4export.state_contract import state_tensors


class TappedExecutor(Executor, Protocol):
    """An executor that also returns values from inside the graph."""

    tapped: dict[str, np.ndarray]


@dataclass(frozen=True)
class Recording:
    """What one sequence of n tokens left at every boundary.

    Attributes:
        tokens: int64 [n], the prompt and the tokens that were decoded after it.
        prompt: how many of them were prefilled.
        hidden: by layer, -1 the embedding: float32 [n, D], or [n, X, D] with hyper-connections.
        experts: by routed layer: int64 [n, K].
        selected: by layer with an indexer: int64 [n, K], -1 for none; K is the largest of all steps.
        state: by layer and name: the rows that can still be seen, oldest first, float32 [rows, W].
        logits: float32 [n, V].
    """

    tokens: np.ndarray
    prompt: int
    hidden: dict[int, np.ndarray]
    experts: dict[int, np.ndarray]
    selected: dict[int, np.ndarray]
    state: dict[tuple[int, str], np.ndarray]
    logits: np.ndarray


def indexed_layers(config: ModelConfig) -> list[int]:
    """The layers in which an indexer selects what is attended to."""
    return [i for i in range(config.num_layers) if "index_key" in {t.name for t in state_tensors(config, i)}]


def tap_names(config: ModelConfig) -> list[str]:
    """The values inside the graph that a recording needs."""
    hidden = [hidden_name(i) for i in range(-1, config.num_layers)]
    chosen = [experts_name(i) for i in config.moe_layers]
    return hidden + chosen + [selected_name(i) for i in indexed_layers(config)]


def record(
    executor: TappedExecutor, config: ModelConfig, prompts: Sequence[Sequence[int]], *, chunk: int, decode: int
) -> list[Recording]:
    """Run prompts as one batch: prefill in chunks of ``chunk`` tokens, then decode ``decode`` tokens greedily."""
    B = len(prompts)
    state = executor.new_state(B)
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
        for name, value in {**executor.tapped, "logits": logits.reshape(B * S, -1)}.items():
            rows = value.reshape(B, S, *value.shape[1:])
            for b, length in enumerate(lengths_B):
                # A copy: a view would keep what other sequences were padded with.
                kept[b].setdefault(name, []).append(rows[b, :length].copy())

    for start in range(0, max(map(len, prompts)), chunk):
        run([prompt[start : start + chunk] for prompt in prompts])
    for _ in range(decode):
        for row, values in zip(tokens, kept, strict=True):
            newest = next(v for v in reversed(values["logits"]) if len(v))
            row.append(int(newest[-1].argmax()))
        run([row[-1:] for row in tokens])
    return [_recording(config, tokens[b], len(prompts[b]), kept[b], state, b) for b in range(B)]


def _recording(
    config: ModelConfig, tokens: list[int], prompt: int, pieces: dict[str, list[np.ndarray]], state: State, b: int
) -> Recording:
    layers = range(config.num_layers)

    def joined(name: str) -> np.ndarray:
        return np.concatenate(pieces.pop(name))  # no longer needed one by one

    return Recording(
        np.array(tokens, np.int64),
        prompt,
        {i: joined(hidden_name(i)).astype(np.float32, copy=False) for i in (-1, *layers)},
        {i: joined(experts_name(i)) for i in config.moe_layers},
        {i: _widest(pieces.pop(selected_name(i))) for i in indexed_layers(config)},
        {(i, t.name): state.rows(i, t.name, b).astype(np.float32) for i in layers for t in state_tensors(config, i)},
        joined("logits"),
    )


def _widest(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Pieces [n, K] of different K one below the other; a step selects no more than there is."""
    width = max(piece.shape[1] for piece in pieces)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=-1) for p in pieces])
