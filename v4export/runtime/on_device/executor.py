"""The token loop's executor over a bundle's TensorRT engines: ids in, logits out, and everything else on the device.

Letters: B sequences, S new tokens, Q positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.graphs.export import DRAFTING, PORTABLE, REMEMBERING
from v4export.graphs.stamp import new_state_name, state_name
from v4export.graphs.trace import FEATURES
from v4export.precision import Precision
from v4export.runtime.executing import GraphExecutor, advance
from v4export.runtime.on_device.device import address
from v4export.runtime.on_device.loaded import Context, Engine, Runtime
from v4export.runtime.on_device.replays import Pass, Replays
from v4export.runtime.on_device.state import DeviceBuffer, DeviceState, places_name
from v4export.runtime.state import Coming
from v4export.runtime.thinking import Thinker

#: A step that an engine has a profile for: number of its first token, tokens, lengths, and what comes after.
Part = tuple[int, np.ndarray, np.ndarray, Coming | None]


class EngineExecutor(GraphExecutor):
    """TensorRT over a bundle.

    A step of more tokens than the engine has a profile for is run in several, and a decode step as a CUDA graph, once
    a state is at its third; then sequences are as many as a power of two, of which the last may be idle.

    Args:
        runtime: that has the bundle's engines.
        config: the model.
        precision: the graph's.
        max_seq_len: most tokens of a sequence.

    Attributes:
        replays: what became of CUDA graphs.
        trunk, features, tail: as of every executor.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: ModelConfig,
        precision: Precision,
        *,
        max_seq_len: int,
    ) -> None:
        super().__init__(runtime.folder, config, precision, max_seq_len)
        self._device = runtime.device
        self._engine = runtime.load(PORTABLE)
        self._remembering = functools.cache(lambda: runtime.load(REMEMBERING))
        self._drafting = functools.cache(lambda: runtime.load(DRAFTING))
        self._most_tokens, self._most_sequences = (self._engine.most("input_ids", axis) for axis in (1, 0))
        if config.thinks:
            self._thinker = Thinker(lambda graph, taps: runtime.load(graph), config, self._state_dtype)
        own = "TensorRT-RTX makes CUDA graphs by itself" if runtime.has_graphs else None
        self.replays = Replays(self._engine, own if runtime.cuda_graphs else "switched off")

    def new_state(self, batch: int = 1) -> DeviceState:
        """A state for ``batch`` sequences that holds no token.

        Raises:
            BadInput: the engine was built for fewer.
        """
        if batch > self._most_sequences:
            raise BadInput(
                "the engine was built for fewer sequences at a time",
                f"{batch} are asked for, {self._most_sequences} are possible",
                f"ask for fewer, or build it with --max-batch-size {batch}",
            )
        state = self._new_state(self.config, batch)
        state.history_BN = self._history(batch)
        return state

    def _new_state(self, config: ModelConfig, batch: int) -> DeviceState:
        with self._device.scope():
            make = functools.partial(DeviceBuffer.on, self._device)
            state = DeviceState.empty(config, batch, self._state_dtype, self.max_seq_len, make=make)
        state.device = self._device
        return state

    def step(
        self,
        tokens_BS: np.ndarray,
        state: DeviceState,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
        commit: bool = True,
    ) -> np.ndarray:
        """Run new tokens and advance the state; arguments and result as of ``Executor.step``."""
        said, every = ["logits", *(["trunk"] if self._thinker else [])], [FEATURES] if self.config.drafts else []
        parts = self._parts(tokens_BS, lengths_B, coming)
        found = self._in_parts(self._engine, parts, state, logits_at_BQ, said, every, commit=commit)
        self.trunk, self.features = found.get("trunk"), found.get(FEATURES)
        return found["logits"]

    def new_draft_state(self, batch: int = 1) -> DeviceState:
        """A state of the layer that drafts, for ``batch`` sequences, that holds no token."""
        return self._new_state(self.config.drafter, batch)

    def draft(
        self,
        tokens_BS: np.ndarray,
        features: np.ndarray,
        state: DeviceState,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray,
        commit: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the engine of the layer that drafts; as ``Drafts.draft``."""
        parts, handed = self._parts(tokens_BS, lengths_B, None), f"new_{FEATURES}"
        fed = {FEATURES: np.asarray(features, self._state_dtype)}
        how: dict[str, Any] = {"commit": commit, "fed": fed, "first": self.config.num_layers}
        found = self._in_parts(self._drafting(), parts, state, logits_at_BQ, ["logits"], [handed], **how)
        return found["logits"], found[handed]

    def _in_parts(
        self,
        engine: Engine,
        parts: Sequence[Part],
        state: DeviceState,
        logits_at_BQ: np.ndarray,
        said: Sequence[str],
        every: Sequence[str],
        *,
        commit: bool,
        fed: Mapping[str, np.ndarray] = MappingProxyType({}),
        first: int = 0,
    ) -> dict[str, np.ndarray]:
        """What an engine says of the wanted positions, and of every token; what is ``fed`` is so for every token."""
        if len(parts) > 1 and not commit:
            raise BadInput(
                "the engine was built for fewer tokens of a step than are to be checked at once",
                f"at most {self._most_tokens}",
                "draft fewer, or build it with a larger --max-chunk",
            )
        found = {"logits": np.zeros((*logits_at_BQ.shape, self.config.vocab_size), np.float32)}
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in every}
        for start, tokens, lengths, following in parts:
            at_BQ, width = logits_at_BQ - start, tokens.shape[1]
            here_BQ = (at_BQ >= 0) & (at_BQ < width)
            # The head is made for one position at least.
            asked = at_BQ.clip(0, width - 1) if here_BQ.any() else np.zeros((len(tokens), 1), np.int64)
            given = {"logits_at": asked, **self._given(state)}
            given |= {name: values[:, start : start + width] for name, values in fed.items()}
            wanted = [*(said if here_BQ.any() else []), *every]
            part = self._run(engine, tokens, state, lengths, given, wanted, following, commit, first)
            if commit:
                state.commit(lengths)
            for name, some in pieces.items():
                some.append(part.pop(name))
            for name, values in part.items():
                if name not in found:
                    found[name] = np.zeros((*here_BQ.shape, values.shape[-1]), values.dtype)
                found[name][here_BQ] = values[here_BQ]
        return found | {name: np.concatenate(some, 1) for name, some in pieces.items()}

    def remember(
        self,
        tokens_BS: np.ndarray,
        state: DeviceState,
        *,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> None:
        """Run new tokens through the layers before the decoder only; as ``Executor.remember``."""
        engine = self._remembering()
        for _, tokens, lengths, following in self._parts(tokens_BS, lengths_B, coming):
            self._run(engine, tokens, state, lengths, {}, [], following)
            state.commit(lengths, past_decoder=False)

    def _parts(self, tokens_BS: np.ndarray, lengths_B: np.ndarray | None, coming: Coming | None) -> list[Part]:
        """Steps that the engine has a profile for: first token, tokens, lengths, and what comes after."""
        lengths_B, most = advance(tokens_BS, lengths_B), self._most_tokens
        pieces = [(at, tokens_BS[:, at : at + most]) for at in range(0, tokens_BS.shape[1], most)]
        steps = [(at, tokens, np.clip(lengths_B - at, 0, tokens.shape[1])) for at, tokens in pieces]
        following = [(tokens, lengths) for _, tokens, lengths in steps[1:]]
        return [(*step, after) for step, after in zip(steps, [*following, coming], strict=True)]

    def _run(
        self,
        engine: Engine,
        tokens_BS: np.ndarray,
        state: DeviceState,
        lengths_B: np.ndarray,
        given: Mapping[str, np.ndarray],
        fetched: Sequence[str],
        coming: Coming | None,
        commit: bool = True,
        first: int = 0,
    ) -> dict[str, np.ndarray]:
        """Run an engine over tokens, what is given besides, and the rows of layers from ``first`` on, in and out.

        Rows that are not to be committed are put in their places by the state, once it is told how many.
        """
        with self._device.scope():
            state.reserve(tokens_BS.shape[1], lengths_B)
            decodes = engine is self._engine and tokens_BS.shape[1] == 1 and commit
            count = self._count(len(tokens_BS), state) if decodes else len(tokens_BS)
            held = {state_name(first + layer, name): buffer.read(count) for layer, name, buffer in state.named()}
            written = {new_state_name(first + layer, name): buffer for layer, name, buffer in state.named()}
            given = {"input_ids": tokens_BS, "position": state.lengths_B, **given}
            given |= self._looked_up(tokens_BS, state, lengths_B, coming)
            fed = {name: _padded(array, count) for name, array in given.items() if name in engine.reads}
            read = [*fed]
            fed |= {places_name(kind): places for kind, places in state.places(lengths_B, count).items()}

            def profile() -> int:
                shapes = {name: fed[name].shape for name in read}
                return engine.profile(shapes | {name: tuple(rows.shape) for name, rows in held.items()})

            def make(context: Context) -> Pass:
                return Pass(self._device, context, fed, held, written)

            if decodes:
                key = state.sequences, [(address(rows), rows.shape) for rows in held.values()]
                step = self.replays.run(count, key, fed, profile, make)
            else:
                step = make(engine.shared_context(profile()))
                step.feed(fed)
                if commit:
                    step.work()
                else:
                    step.compute()
            state.waiting = None if commit else step
            return {name: self._device.fetch(step.outputs[name])[: len(tokens_BS)] for name in fetched}

    def _count(self, sequences: int, state: DeviceState) -> int:
        """Sequences of a decode step: few numbers of them have few graphs."""
        if self.replays.reason is not None:
            return sequences
        return min(1 << (sequences - 1).bit_length(), state.sequences)


def _padded(array: np.ndarray, count: int) -> np.ndarray:
    """With zeros for idle sequences behind it."""
    if array.dtype.kind == "i":
        array = array.astype(np.int64, copy=False)
    return np.pad(array, [(0, count - len(array)), *[(0, 0)] * (array.ndim - 1)]) if count > len(array) else array
