"""The token loop's executor over a bundle's TensorRT engines: ids in, logits out, and everything else on the device.

Letters: B sequences, S new tokens, Q positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.graphs.export import PORTABLE, REMEMBERING
from v4export.graphs.stamp import new_state_name, state_name
from v4export.precision import Precision
from v4export.runtime.executing import GraphExecutor, advance
from v4export.runtime.generate import Coming
from v4export.runtime.on_device.device import address
from v4export.runtime.on_device.loaded import Context, Engine, Runtime
from v4export.runtime.on_device.replays import Pass, Replays, places_name
from v4export.runtime.on_device.state import DeviceBuffer, DeviceState
from v4export.runtime.thinking import Thinker


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
        trunk, tail: as of every executor.
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
        with self._device.scope():
            make = functools.partial(DeviceBuffer.on, self._device)
            state = DeviceState.empty(self.config, batch, self._state_dtype, self.max_seq_len, make=make)
        state.device, state.history_BN = self._device, self._history(batch)
        return state

    def step(
        self,
        tokens_BS: np.ndarray,
        state: DeviceState,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> np.ndarray:
        """Run new tokens and advance the state; arguments and result as of ``Executor.step``."""
        outputs = ["logits", *(["trunk"] if self._thinker else [])]
        found: dict[str, np.ndarray] = {}
        for start, tokens, lengths, following in self._parts(tokens_BS, lengths_B, coming):
            at_BQ = logits_at_BQ - start
            here_BQ = (at_BQ >= 0) & (at_BQ < tokens.shape[1])
            # The head is made for one position at least.
            asked = at_BQ.clip(0, tokens.shape[1] - 1) if here_BQ.any() else np.zeros((len(tokens), 1), np.int64)
            given = {"logits_at": asked, **self._given(state)}
            part = self._run(self._engine, tokens, state, lengths, given, outputs if here_BQ.any() else [], following)
            state.commit(lengths)
            if here_BQ.all():
                found = part
                continue
            for name, values in part.items():
                if name not in found:
                    found[name] = np.zeros((*here_BQ.shape, values.shape[-1]), values.dtype)
                found[name][here_BQ] = values[here_BQ]
        self.trunk = found.get("trunk")
        return found.get("logits", np.zeros((*logits_at_BQ.shape, self.config.vocab_size), np.float32))

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

    def _parts(
        self, tokens_BS: np.ndarray, lengths_B: np.ndarray | None, coming: Coming | None
    ) -> list[tuple[int, np.ndarray, np.ndarray, Coming | None]]:
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
    ) -> dict[str, np.ndarray]:
        """Run an engine over tokens, what is given besides, and the state's rows, in and out."""
        with self._device.scope():
            state.reserve(tokens_BS.shape[1], lengths_B)
            decodes = engine is self._engine and tokens_BS.shape[1] == 1
            count = self._count(len(tokens_BS), state) if decodes else len(tokens_BS)
            held = {state_name(layer, name): buffer.read(count) for layer, name, buffer in state.named()}
            written = {new_state_name(layer, name): buffer for layer, name, buffer in state.named()}
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
                step.work()
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
