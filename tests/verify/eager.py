"""An executor that runs the PyTorch definition as a graph is run: in chunks, over outside state, rounding as it stores.

What a defect of an exporter does to a V4 graph can be done to it, too, by patching what the definition calls.
"""

from __future__ import annotations

import numpy as np
import torch

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.graphs.stamp import experts_name, hidden_name, selected_name
from v4export.model.linear import Storage
from v4export.model.load import load_transformer
from v4export.precision import Precision
from v4export.runtime.state import State
from v4export.verify.rounded import as_the_graph_holds


class EagerExecutor:
    """As ``OnnxExecutor``, with absorbed attention and weights as a graph holds them."""

    def __init__(
        self, weights: dict[str, Weight], config: ModelConfig, precision: Precision, max_seq_len: int = 512
    ) -> None:
        self.config, self.max_seq_len = config, max_seq_len
        self.dtype = getattr(torch, precision.activations)

        def lookup(name: str) -> torch.Tensor:
            return torch.from_numpy(as_the_graph_holds(weights[name], precision))

        self.model = load_transformer(config, lookup, storage=Storage(self.dtype))
        self.tapped: dict[str, np.ndarray] = {}

    def new_state(self, batch: int = 1) -> State:
        # What is stored has been rounded already.
        return State.empty(self.config, batch, np.dtype(np.float32), self.max_seq_len)

    def step(self, tokens_BS, state, *, logits_at_BQ, lengths_B=None):
        B, S = tokens_BS.shape
        state.reserve(S, lengths_B)
        # A copy: eager operators may return views of what they read, and rows are written where state is read.
        held = [{name: self._read(state, i, name) for name in buffers} for i, buffers in enumerate(state.layers)]
        ids, position = (torch.from_numpy(np.array(v, np.int64)) for v in (tokens_BS, state.lengths_B))
        self.tapped = {}
        with torch.inference_mode():
            x, shared = self.model.embed.shared(ids, position)
            self._tap(hidden_name(-1), x)
            for i, layer in enumerate(self.model.layers):
                out = layer(x, shared, held[i])
                x = out.hidden
                self._tap(hidden_name(i), x)
                self._tap(experts_name(i), out.experts)
                self._tap(selected_name(i), out.selected)
                for name, rows in zip(layer.state_names, out.rows, strict=True):
                    state.room(i, name)[:] = rows.float().numpy()
            at = torch.from_numpy(np.array(logits_at_BQ, np.int64))
            logits = self.model.head(x, at).numpy()
        state.commit(np.full(B, S) if lengths_B is None else lengths_B)
        return logits

    def _read(self, state: State, layer: int, name: str) -> torch.Tensor:
        array = torch.from_numpy(state.held(layer, name).copy())
        return array if state.layers[layer][name].tensor.float32 else array.to(self.dtype)

    def _tap(self, name: str, value: torch.Tensor | None) -> None:
        if value is not None:
            self.tapped[name] = (value.float() if value.is_floating_point() else value).numpy()
