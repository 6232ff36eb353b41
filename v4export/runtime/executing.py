"""What executors of a bundle's graphs have in common: numbers beside the tokens, look-ups, and thoughts.

Letters: B sequences, S new tokens, Q positions, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from v4export.config import ModelConfig
from v4export.engram.files import load_feed
from v4export.errors import BadInput
from v4export.graphs.shards import numpy_dtype
from v4export.graphs.stamp import engram_name, state_name
from v4export.graphs.trace import DECODER_START
from v4export.precision import Precision
from v4export.runtime.state import Coming
from v4export.runtime.thinking import Thinker, Thought
from v4export.state_contract import may_skip_decoder


class GraphExecutor:
    """A part of every executor.

    Args:
        folder: of the bundle.
        config: the model.
        precision: the graph's.
        max_seq_len: most tokens of a sequence.

    Attributes:
        trunk: of a model that thinks, what thoughts about the last step's wanted positions start from, [B, Q, D].
        features: of a model that drafts, what drafts go on from, of all tokens of the last step, [B, S, ..].
        tail: of a model with a decoder, how many of a prompt's last tokens have to pass it; else None.
    """

    def __init__(self, folder: Path, config: ModelConfig, precision: Precision, max_seq_len: int) -> None:
        self.config, self.max_seq_len = config, max_seq_len
        self._state_dtype = numpy_dtype(precision.activations)
        self._lookup = load_feed(folder, self._state_dtype) if config.engram else None
        self._thinker: Thinker | None = None
        self.trunk: np.ndarray | None = None
        self.features: np.ndarray | None = None
        self._has_decoder = any(map(config.is_decoder, range(config.num_layers)))
        skips = config.compressed and may_skip_decoder(config)
        self.tail = config.compressed.window if config.compressed and skips else None

    def think(
        self,
        trunk_BQD: np.ndarray,
        state: Any,
        *,
        at_BQ: np.ndarray | None = None,
        steps: int | None = None,
        looped: bool = False,
    ) -> Thought:
        """Think about positions that the state holds; arguments as for ``Thinks.think``.

        Raises:
            BadInput: the model does not think, or was not exported for so many steps.
        """
        if self._thinker is None:
            raise BadInput("this model was exported without reasoning layers", fix="leave --think out")
        # A sequence that holds nothing rides along, and has no last token.
        at_BQ = np.maximum(state.lengths_B[:, None] - 1, 0) if at_BQ is None else at_BQ
        layers = range(self.config.num_layers, self.config.state_layers)
        rows = {state_name(layer, name): state.held(layer, name) for layer in layers for name in state.layers[layer]}
        return self._thinker.think(trunk_BQD, np.ascontiguousarray(at_BQ, np.int64), rows, steps, looped)

    def _history(self, batch: int) -> np.ndarray | None:
        """What look-ups know of tokens before the first."""
        return self._lookup.hasher.empty_history(batch) if self._lookup else None

    @property
    def activations(self) -> np.dtype:
        """Type of rows of the state that have none of their own."""
        return self._state_dtype

    def history_of(self, tokens: np.ndarray) -> np.ndarray | None:
        """What look-ups know behind tokens [N] of one sequence, int64 [1, N-1]; None where nothing is looked up."""
        if self._lookup is None:
            return None
        history = self._lookup.hasher.empty_history(1)
        # No more can be seen than the history is long.
        return self._lookup.hasher.rows(tokens[None, -history.shape[1] :], history)[1]

    def _given(self, state: Any) -> dict[str, np.ndarray]:
        """Numbers that the graph takes beside tokens and positions."""
        return {DECODER_START: state.decoder_start_B} if self._has_decoder else {}

    def _looked_up(
        self, tokens_BS: np.ndarray, state: Any, lengths_B: np.ndarray | None, coming: Coming | None
    ) -> dict[str, np.ndarray]:
        """What Engram layers look up for the step's tokens, by the graph's names."""
        if self._lookup is None:
            return {}
        assert state.history_BN is not None
        found, state.history_BN = self._lookup.rows(tokens_BS, state.history_BN, lengths_B)
        if coming:
            self._lookup.prefetch(coming[0], state.history_BN, coming[1])
        return {engram_name(layer): np.ascontiguousarray(rows) for layer, rows in found.items()}


def advance(tokens_BS: np.ndarray, lengths_B: np.ndarray | None) -> np.ndarray:
    """By how many tokens each sequence advances, [B]."""
    return np.full(len(tokens_BS), tokens_BS.shape[1]) if lengths_B is None else lengths_B
