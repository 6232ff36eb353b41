"""Runs a bundle's graph through onnxruntime, with the state kept outside the graph."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from v4export.config import ModelConfig
from v4export.config.sharding import Sharding
from v4export.graphs.export import DRAFTING, PORTABLE, REMEMBERING
from v4export.graphs.stamp import new_state_name, state_name
from v4export.graphs.trace import FEATURES
from v4export.precision import Precision
from v4export.runtime.executing import GraphExecutor, advance
from v4export.runtime.ranks import session
from v4export.runtime.sessions import OnRun, Running, Session
from v4export.runtime.state import Coming, State
from v4export.runtime.thinking import Thinker
from v4export.state_contract import state_tensors


class OnnxExecutor(GraphExecutor):
    """One onnxruntime session over a bundle.

    Args:
        folder: of the bundle.
        config: the model.
        precision: the graph's.
        max_seq_len: most tokens of a sequence.
        device: ``cpu`` or ``cuda``.
        taps: names of values inside the graph, or of new rows, to be returned by every step as well.
        threads: of onnxruntime; 0 lets it choose.
        prepack: let onnxruntime keep a copy of the weights in its kernels' layout: faster prefill, twice the memory.
        bodies: on a CPU, run the portable graph's own bodies in place of the fast copy.
        kernels: on a CPU, run the portable graph by this project's own kernels.
        thought_taps: let thoughts also return the hidden states after each of their layers.
        draft_taps: names of values inside the graph that drafts, to be returned by every step of it as well.
        accuracy_level: 0 multiplies integer matrices by activations as they are; 4 by activations in eight bits.
        sharding: how the bundle's model is shared among ranks, which all run here unless torchrun started each.
        on_run: told the name of each graph that is about to run, and its inputs by name.

    Attributes:
        tapped: the tapped values of the last step, and what was looked up for it.
        draft_tapped: those of the last step of the layer that drafts.
        trunk: of a model that thinks, what thoughts about the last step's wanted positions start from, [B, Q, D].
        features: of a model that drafts, what drafts go on from, of all tokens of the last step, [B, S, ..].
        tail: of a model with a decoder, how many of a prompt's last tokens have to pass it; else None.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        precision: Precision,
        *,
        max_seq_len: int,
        device: str = "cpu",
        taps: Sequence[str] = (),
        threads: int = 0,
        prepack: bool = True,
        bodies: bool = False,
        kernels: bool = False,
        thought_taps: bool = False,
        draft_taps: Sequence[str] = (),
        accuracy_level: int = 0,
        sharding: Sharding | None = None,
        on_run: OnRun | None = None,
    ) -> None:
        super().__init__(folder, config, precision, max_seq_len)
        how = Running(folder, device, threads, prepack, bodies, kernels, accuracy_level, on_run=on_run)
        layers = range(config.state_layers)
        rows = {new_state_name(layer, t.name) for layer in layers for t in state_tensors(config, layer)}
        self._row_taps = [name for name in taps if name in rows]
        self._draft_row_taps = [name for name in draft_taps if name.startswith(new_state_name(config.num_layers, ""))]
        self._session = session(how, PORTABLE, sharding, [name for name in taps if name not in rows])
        # A rank of a pipeline has the rows of its own layers.
        self._held = self._session.reads if sharding else None
        # Few users of a model with a decoder skip it, and a second session has weights of its own.
        self._remembering = functools.cache(lambda: Session(how, REMEMBERING))
        self._drafting = functools.cache(
            lambda: Session(how, DRAFTING, [n for n in draft_taps if n not in self._draft_row_taps])
        )
        if config.thinks:
            self._thinker = Thinker(
                lambda graph, taps: Session(how, graph, taps), config, self._state_dtype, thought_taps
            )
        self.tapped: dict[str, np.ndarray] = {}
        self.draft_tapped: dict[str, np.ndarray] = {}
        if sharding:  # what skips the decoder is a graph of its own, which ranks have none of
            self.tail = None

    def new_state(self, batch: int = 1) -> State:
        """A state for ``batch`` sequences that holds no token."""
        state = State.empty(self.config, batch, self._state_dtype, self.max_seq_len, self._held)
        state.history_BN = self._history(batch)
        return state

    def step(
        self,
        tokens_BS: np.ndarray,
        state: State,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
        commit: bool = True,
    ) -> np.ndarray:
        """Run new tokens and advance the state.

        Args:
            tokens_BS: int64; shorter sequences are padded on the right.
            state: changed in place.
            logits_at_BQ: which of the S tokens' logits are wanted, 0 .. S-1.
            lengths_B: how many of the S tokens are real, S unless given.
            coming: tokens and lengths of the next step, where they are known: what is looked up for them is looked up
                while this step runs.
            commit: whether the state advances; if not, its ``commit`` may let it, by as many tokens as are to be held.

        Returns:
            logits float32 [B, Q, V].
        """
        logits = np.empty((*logits_at_BQ.shape, self.config.vocab_size), np.float32)
        given, outputs = {"logits_at": logits_at_BQ, **self._given(state)}, {"logits": logits}
        if self._thinker:
            self.trunk = np.empty((*logits_at_BQ.shape, self.config.hidden_size), self._state_dtype)
            outputs["trunk"] = self.trunk
        if self.config.drafts:
            self.features = outputs[FEATURES] = self._new_features(tokens_BS)
        found = self._looked_up(tokens_BS, state, lengths_B, coming)
        self.tapped = self._run(self._session, tokens_BS, state, lengths_B, given | found, outputs)
        self.tapped |= self._rows_among(outputs | found, [*self._row_taps, *found])
        if commit:
            state.commit(advance(tokens_BS, lengths_B))
        return logits

    def new_draft_state(self, batch: int = 1) -> State:
        """A state of the layer that drafts, for ``batch`` sequences, that holds no token."""
        return State.empty(self.config.drafter, batch, self._state_dtype, self.max_seq_len)

    def draft(
        self,
        tokens_BS: np.ndarray,
        features: np.ndarray,
        state: State,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray,
        commit: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the layer that drafts; as ``Drafts.draft``."""
        logits = np.empty((*logits_at_BQ.shape, self.config.vocab_size), np.float32)
        handed = self._new_features(tokens_BS)
        given = {"logits_at": logits_at_BQ, FEATURES: np.ascontiguousarray(features, self._state_dtype)}
        outputs = {"logits": logits, f"new_{FEATURES}": handed}
        first = self.config.num_layers
        self.draft_tapped = self._run(self._drafting(), tokens_BS, state, lengths_B, given, outputs, first=first)
        self.draft_tapped |= self._rows_among(outputs, self._draft_row_taps)
        if commit:
            state.commit(lengths_B)
        return logits, handed

    @staticmethod
    def _rows_among(values: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
        """Of values [B, S, W] those of some names, [B*S, W]."""
        return {name: values[name].reshape(-1, values[name].shape[-1]) for name in names}

    def _new_features(self, tokens_BS: np.ndarray) -> np.ndarray:
        return np.empty((*tokens_BS.shape, *self.config.hidden_shape), self._state_dtype)

    def remember(
        self,
        tokens_BS: np.ndarray,
        state: State,
        *,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> None:
        """Run new tokens through the layers before the decoder only; arguments as for ``step``.

        What decoder layers see of a sequence begins behind them: it is what the model's authors do with all but the
        last tokens of a prompt, and not the same as running every token through every layer.
        """
        found = self._looked_up(tokens_BS, state, lengths_B, coming)
        self._run(self._remembering(), tokens_BS, state, lengths_B, found, {}, remembered_only=True)
        state.commit(advance(tokens_BS, lengths_B), past_decoder=False)

    def _run(
        self,
        session: Any,
        tokens_BS: np.ndarray,
        state: State,
        lengths_B: np.ndarray | None,
        given: Mapping[str, np.ndarray],
        outputs: dict[str, np.ndarray],
        remembered_only: bool = False,
        first: int = 0,
    ) -> dict[str, np.ndarray]:
        """Run a graph over tokens, what is given besides, and the rows of the state's layers from number ``first`` on.

        Returns the taps.
        """
        state.reserve(tokens_BS.shape[1], lengths_B)
        inputs = {"input_ids": tokens_BS, "position": state.lengths_B, **given}
        inputs = {n: np.ascontiguousarray(v, np.int64) if v.dtype.kind == "i" else v for n, v in inputs.items()}
        for layer, buffers in enumerate(state.layers):
            for name, buffer in buffers.items():
                if buffer.remembered or not remembered_only:
                    # Of what a graph only adds to it reads nothing.
                    inputs[state_name(first + layer, name)] = state.held(layer, name)
                    outputs[new_state_name(first + layer, name)] = state.room(layer, name)
        return session.run(inputs, outputs)
