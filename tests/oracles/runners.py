"""Feeds token sequences to this project's model or to its exported graph, a chunk at a time, and keeps all logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch_state

from v4export.engram.hashing import Hasher
from v4export.model import Transformer
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.state import State


class Runner(Protocol):
    """Takes the next tokens of a batch and gives the logits of all of them."""

    def step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray: ...


class Lookup(Protocol):
    """Finds what Engram layers look up, as ``EngramFeed`` does."""

    hasher: Hasher

    def rows(self, tokens_BS: np.ndarray, history_BN: np.ndarray, lengths_B: np.ndarray) -> tuple[Any, np.ndarray]: ...


class TorchRunner:
    """The PyTorch definition over the runtime's state; what no query may see holds a number that would show."""

    def __init__(self, model: Transformer, batch: int, lookup: Lookup | None = None) -> None:
        self.model, self.lookup = model, lookup
        self.state = State.empty(model.config, batch, np.dtype(np.float32), 10_000)
        if lookup:
            self.state.history_BN = lookup.hasher.empty_history(batch)
        for buffer in self.state.buffers:
            buffer.array[:] = 7.0

    def step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        B, S = tokens_BS.shape
        every, start = torch.arange(S).expand(B, S), torch.from_numpy(self.state.decoder_start_B)
        with torch.no_grad():
            *given, found = self._given(tokens_BS, lengths_B)
            out = self.model(*given, every, found, start)
        self._put(out.rows)
        self.state.commit(lengths_B)
        return out.logits.numpy()

    def remember(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> None:
        """The same for tokens that do not pass the decoder."""
        with torch.no_grad():
            rows = self.model.remember(*self._given(tokens_BS, lengths_B))
        self._put(rows)
        self.state.commit(lengths_B, past_decoder=False)

    def _given(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> tuple[Any, ...]:
        """Tokens, positions, rows held, and what was looked up."""
        self.state.reserve(tokens_BS.shape[1], lengths_B)
        held = [
            {name: torch_state.held(self.state.held(i, name)) for name in buffers}
            for i, buffers in enumerate(self.state.layers)
        ]
        found = None
        if self.lookup:
            assert self.state.history_BN is not None
            found, self.state.history_BN = self.lookup.rows(tokens_BS, self.state.history_BN, lengths_B)
            found = {layer: torch.from_numpy(rows) for layer, rows in found.items()}
        return torch.from_numpy(tokens_BS), torch.from_numpy(self.state.lengths_B), held, found

    def _put(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
        for i, layer in enumerate(rows):
            for name, new in layer.items():
                torch_state.put(self.state.room(i, name), new)


class OnnxRunner:
    """The exported graph through onnxruntime."""

    def __init__(self, executor: OnnxExecutor, batch: int) -> None:
        self.executor, self.state = executor, executor.new_state(batch)

    def step(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        every = np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)
        return self.executor.step(tokens_BS, self.state, logits_at_BQ=every, lengths_B=lengths_B)

    def remember(self, tokens_BS: np.ndarray, lengths_B: np.ndarray) -> None:
        """The same for tokens that do not pass the decoder."""
        self.executor.remember(tokens_BS, self.state, lengths_B=lengths_B)


def run_one(runner: Runner, ids: np.ndarray, chunks: Sequence[int], singles: int) -> np.ndarray:
    """Logits [S, V] of one sequence, fed in chunks and then token by token."""
    out, at = [], 0
    for size in [*chunks, *[1] * singles]:
        out.append(runner.step(ids[None, at : at + size], np.array([size]))[0])
        at += size
    assert at == len(ids)
    return np.concatenate(out)


def run_batch(runner: Runner, sequences: Sequence[np.ndarray], chunk: int) -> list[np.ndarray]:
    """Logits of sequences of unequal lengths, fed side by side and padded on the right."""
    out: list[list[np.ndarray]] = [[] for _ in sequences]
    for at in range(0, max(map(len, sequences)), chunk):
        parts = [ids[at : at + chunk] for ids in sequences]
        lengths = np.array([len(part) for part in parts])
        tokens = np.zeros((len(parts), lengths.max()), np.int64)
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = part
        for b, logits in enumerate(runner.step(tokens, lengths)):
            out[b].append(logits[: lengths[b]])
    return [np.concatenate(one) for one in out]


def greedy(executor: OnnxExecutor, prompt: np.ndarray, count: int) -> list[int]:
    """The tokens of one sequence that follow a prompt, each the likeliest."""
    state, tokens, out = executor.new_state(), prompt[None], []
    while len(out) < count:
        logits = executor.step(tokens, state, logits_at_BQ=np.array([[tokens.shape[1] - 1]]))
        out.append(int(logits[0, 0].argmax()))
        tokens = np.array([[out[-1]]])
    return out
