"""An executor that runs the PyTorch definition as a graph is run: in chunks, over outside state, rounding as it stores.

What a defect of an exporter does to a V4 graph can be done to it, too, by patching what the definition calls.
"""

from __future__ import annotations

import numpy as np
import torch
import torch_state

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.engram.feed import EngramFeed
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.graphs.export import engram_tables
from v4export.graphs.stamp import (
    candidates_name,
    engram_name,
    experts_name,
    hidden_name,
    new_state_name,
    selected_name,
    shares_name,
)
from v4export.model.block import STATE, block_shares, head_reads
from v4export.model.load import load_transformer
from v4export.precision import Precision
from v4export.runtime.pausing import Thought
from v4export.runtime.state import State
from v4export.state_contract import may_skip_decoder
from v4export.verify.recording import recorded_rows
from v4export.verify.rounded import as_the_graph_holds


class EagerExecutor:
    """As ``OnnxExecutor``, with absorbed attention and weights as a graph holds them.

    ``token_map`` and ``tables`` are what a model with Engram is looked up by.
    """

    def __init__(
        self,
        weights: dict[str, Weight],
        config: ModelConfig,
        precision: Precision,
        max_seq_len: int = 512,
        token_map: np.ndarray | None = None,
    ) -> None:
        self.config, self.max_seq_len = config, max_seq_len
        self.dtype = getattr(torch, precision.activations)
        self.tail = config.compressed.window if config.compressed and may_skip_decoder(config) else None

        def lookup(name: str) -> torch.Tensor:
            return torch.from_numpy(as_the_graph_holds(weights[name], precision))

        self.model = load_transformer(config, lookup, dtype=self.dtype)
        self.feed = None
        if config.engram and token_map is not None:
            tables = {layer: Table(*stored) for layer, stored in engram_tables(weights).items()}
            # What is stored has been rounded already.
            self.feed = EngramFeed(Hasher.of(config.engram, token_map), tables)
        self.tapped: dict[str, np.ndarray] = {}
        self.trunk: np.ndarray | None = None

    def new_state(self, batch: int = 1) -> State:
        state = State.empty(self.config, batch, np.dtype(np.float32), self.max_seq_len)
        state.history_BN = self.feed.hasher.empty_history(batch) if self.feed else None
        return state

    def step(self, tokens_BS, state, *, logits_at_BQ, lengths_B=None, coming=None):
        B, S = tokens_BS.shape
        self.tapped = {}
        with torch.inference_mode():
            ids, position, held, found = self._given(tokens_BS, state, lengths_B)
            start = torch.from_numpy(state.decoder_start_B)
            x, shared = self.model.embed.shared(ids, position, start)
            self._tap_all(-1, {"hidden": x} | {name: shared[name] for name in ("pre",) if name in shared})
            shared["hidden"] = x
            for i, layer in enumerate(self.model.layers):
                if self.config.has_engram(i):
                    shared["engram"] = found[i]
                    self._tap(engram_name(i), found[i].flatten(0, 1))
                out = layer(shared["hidden"], shared, held[i])
                named = out.named() | {STATE + name: value for name, value in held[i].items()}
                shared |= {name: named[own] for name, own in block_shares(self.config, i).items()}
                self._tap_all(i, named)
                self._put(state, i, out.rows)
            shared["logits_at"] = torch.from_numpy(np.array(logits_at_BQ, np.int64))
            logits, *trunk = self.model.head(*(shared[name] for name in head_reads(self.config)))
            if self.config.thinks:
                (self.trunk,) = (value.float().numpy() for value in trunk)
                for j, rows in enumerate(self.model.head.rows(shared["hidden"], position, shared.get("pre"))):
                    self._put(state, self.config.num_layers + j, rows)
        state.commit(np.full(B, S) if lengths_B is None else lengths_B)
        return logits.numpy()

    def think(self, trunk_BQD, state, *, at_BQ=None, steps=None, looped=False):
        at = torch.from_numpy(state.lengths_B[:, None] - 1 if at_BQ is None else at_BQ)
        trunk = torch.from_numpy(np.array(trunk_BQD)).to(self.dtype)
        layers = range(self.config.num_layers, self.config.state_layers)
        latents = [self._read(state, i, name) for i in layers for name in state.layers[i]]
        with torch.inference_mode():
            if looped:
                return self._loop(trunk, at, latents, steps or self.model.head.steps)
            found = self.model.head.think(trunk, at, *latents, steps=steps)
        return _thought(found.logits, found.weight, found.tokens, found.hidden)

    def _loop(self, trunk, at, latents, steps):
        """A step of the thought at a time, as a caller of a graph of one step does it."""
        head, start = self.model.head, self.config.vocab_size
        thought, entering, tokens, hidden = trunk, torch.full_like(at, start), [], []
        own = [torch.zeros(0, *at.shape, self.config.thinker.latent_dim, dtype=self.dtype)] * len(head.reasoning.layers)
        for k in range(1, steps + 1):
            if k > 1:
                entering = torch.full_like(at, start + 1) if k == steps else entering
                tokens += [entering] if k < steps else []
            thought, entering, own, each = head.step(thought, entering, at, *latents, *own)
            hidden.append(each)
        return _thought(*head.mix(trunk, thought), torch.stack(tokens, -1) if tokens else None, hidden)

    def remember(self, tokens_BS, state, *, lengths_B=None, coming=None):
        with torch.inference_mode():
            rows = self.model.remember(*self._given(tokens_BS, state, lengths_B))
        for i, layer in enumerate(rows):
            self._put(state, i, layer)
        lengths = np.full(len(tokens_BS), tokens_BS.shape[1]) if lengths_B is None else lengths_B
        state.commit(lengths, past_decoder=False)

    def _given(self, tokens_BS, state, lengths_B):
        """Token ids, positions, copies of the rows held (views of what is read may be returned), what is looked up."""
        state.reserve(tokens_BS.shape[1], lengths_B)
        held = [{name: self._read(state, i, name) for name in buffers} for i, buffers in enumerate(state.layers)]
        ids, position = (torch.from_numpy(np.array(v, np.int64)) for v in (tokens_BS, state.lengths_B))
        found = {}
        if self.feed:
            rows, state.history_BN = self.feed.rows(tokens_BS, state.history_BN, lengths_B)
            found = {layer: torch.from_numpy(some).to(self.dtype) for layer, some in rows.items()}
        return ids, position, held, found

    def _read(self, state: State, layer: int, name: str) -> torch.Tensor:
        rows = torch_state.held(state.held(layer, name).copy())
        return rows if state.layers[layer][name].tensor.dtype else rows.to(self.dtype)

    def _put(self, state: State, layer: int, rows: dict[str, torch.Tensor]) -> None:
        for name, new in rows.items():
            torch_state.put(state.room(layer, name), new)
            if (layer, name) in recorded_rows(self.config):
                self._tap(new_state_name(layer, name), new.flatten(0, 1))

    def _tap_all(self, layer: int, named: dict[str, torch.Tensor]) -> None:
        for name, called in _TAPPED.items():
            if name in named:
                self._tap(called(layer), named[name])

    def _tap(self, name: str, value: torch.Tensor) -> None:
        self.tapped[name] = (value.float() if value.is_floating_point() else value).numpy()


def _thought(logits, weight, tokens, hidden) -> Thought:
    none = np.zeros((*weight.shape, 0), np.int64)
    after = {(k, j): x.float().numpy() for k, each in enumerate(hidden, 1) for j, x in enumerate(each)}
    return Thought(logits.numpy(), weight.numpy(), none if tokens is None else tokens.numpy(), after)


_TAPPED = {
    "hidden": hidden_name,
    "experts": experts_name,
    "selected": selected_name,
    "candidates": candidates_name,
    "pre": shares_name,
}
