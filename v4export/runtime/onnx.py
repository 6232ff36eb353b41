"""Runs a bundle's graph through onnxruntime, with the state kept outside the graph."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from v4export.config import ModelConfig
from v4export.engram.files import load_feed
from v4export.errors import BadInput, NotEnough, NotSupported, missing_package
from v4export.graphs.export import LOWERED_FOR_CPU, PORTABLE, REMEMBERING, REMEMBERING_FOR_CPU
from v4export.graphs.lower import bodies_for_cpu, with_bodies
from v4export.graphs.stamp import engram_name, new_state_name, state_name
from v4export.graphs.trace import DECODER_START
from v4export.graphs.weights import numpy_dtype
from v4export.precision import Precision
from v4export.runtime.generate import Coming
from v4export.runtime.state import State
from v4export.state_contract import may_skip_decoder

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

#: ``ENABLE_ALL`` turns dequantise-and-multiply into products with int8 activations, an error of 1e-2. Level 0 keeps
#: activations in their own type.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}

#: A GPU multiplies float32 as TF32 unless told not to, which is an error of 6e-4.
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


class OnnxExecutor:
    """One onnxruntime session over a bundle.

    Args:
        folder: of the bundle.
        config: the model.
        precision: the graph's.
        max_seq_len: most tokens of a sequence.
        device: ``cpu`` or ``cuda``.
        taps: names of values inside the graph to be returned by every step as well.
        threads: of onnxruntime; 0 lets it choose.
        prepack: let onnxruntime keep a copy of the weights in its kernels' layout: faster prefill, twice the memory.
        bodies: on a CPU, run the portable graph's own bodies in place of the fast copy.

    Attributes:
        tapped: the tapped values of the last step, and what was looked up for it.
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
    ) -> None:
        self.config, self.max_seq_len, self.taps = config, max_seq_len, tuple(taps)
        self._state_dtype = numpy_dtype(precision.activations)
        self._state_type = int(ir.DataType.from_numpy(self._state_dtype))
        self._folder = folder
        how = (folder, device, threads, prepack, bodies)
        self._session = _session(PORTABLE, self.taps, *how)
        # Few users of a model with a decoder skip it, and a second session has weights of its own.
        self._remembering = functools.cache(lambda: _session(REMEMBERING, (), *how))
        self._lookup = load_feed(folder, self._state_dtype) if config.engram else None
        self.tapped: dict[str, np.ndarray] = {}
        self._has_decoder = any(map(config.is_decoder, range(config.num_layers)))
        self.tail = config.compressed.window if config.compressed and may_skip_decoder(config) else None

    def new_state(self, batch: int = 1) -> State:
        """A state for ``batch`` sequences that holds no token."""
        state = State.empty(self.config, batch, self._state_dtype, self.max_seq_len)
        if self._lookup:
            state.history_BN = self._lookup.hasher.empty_history(batch)
        return state

    def step(
        self,
        tokens_BS: np.ndarray,
        state: State,
        *,
        logits_at_BQ: np.ndarray,
        lengths_B: np.ndarray | None = None,
        coming: Coming | None = None,
    ) -> np.ndarray:
        """Run new tokens and advance the state.

        Args:
            tokens_BS: int64; shorter sequences are padded on the right.
            state: changed in place.
            logits_at_BQ: which of the S tokens' logits are wanted, 0 .. S-1.
            lengths_B: how many of the S tokens are real, S unless given.
            coming: tokens and lengths of the next step, where they are known: what is looked up for them is looked up
                while this step runs.

        Returns:
            logits float32 [B, Q, V].
        """
        logits = np.empty((*logits_at_BQ.shape, self.config.vocab_size), np.float32)
        given = {"logits_at": logits_at_BQ}
        if self._has_decoder:
            given[DECODER_START] = state.decoder_start_B
        binding = self._bound(self._session, tokens_BS, state, lengths_B, given, coming)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, _address(logits))
        for name in self.taps:
            binding.bind_output(name, "cpu")
        with _explained(self._folder):
            self._session.run_with_iobinding(binding)
        if self.taps:
            outputs = binding.get_outputs()[-len(self.taps) :]
            self.tapped = {name: _array(value) for name, value in zip(self.taps, outputs, strict=True)}
            self.tapped |= {name: rows.reshape(-1, rows.shape[-1]) for name, rows in binding.looked_up.items()}
        state.commit(_advance(tokens_BS, lengths_B))
        return logits

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
        binding = self._bound(self._remembering(), tokens_BS, state, lengths_B, {}, coming, remembered_only=True)
        with _explained(self._folder):
            self._remembering().run_with_iobinding(binding)
        state.commit(_advance(tokens_BS, lengths_B), past_decoder=False)

    def _bound(
        self,
        session: Any,
        tokens_BS: np.ndarray,
        state: State,
        lengths_B: np.ndarray | None,
        given: dict[str, np.ndarray],
        coming: Coming | None,
        remembered_only: bool = False,
    ) -> Any:
        """A binding of tokens, of what is looked up for them, and of the state's rows, in and out."""
        state.reserve(tokens_BS.shape[1], lengths_B)
        binding = session.io_binding()
        binding.looked_up = {}
        integers = {"input_ids": tokens_BS, "position": state.lengths_B, **given}
        inputs = {name: (np.ascontiguousarray(value, np.int64), _INT64) for name, value in integers.items()}
        if self._lookup:
            assert state.history_BN is not None
            found, state.history_BN = self._lookup.rows(tokens_BS, state.history_BN, lengths_B)
            if coming:
                self._lookup.prefetch(coming[0], state.history_BN, coming[1])
            kind = self._state_type if self._lookup.tables else _INT64
            binding.looked_up = {engram_name(layer): np.ascontiguousarray(rows) for layer, rows in found.items()}
            inputs |= {name: (rows, kind) for name, rows in binding.looked_up.items()}
        # The graph of tokens that are only remembered does not read what it only adds to.
        read = {value.name for value in session.get_inputs()} if remembered_only else None
        for layer, buffers in enumerate(state.layers):
            for name, buffer in buffers.items():
                if remembered_only and not buffer.remembered:
                    continue
                held, room = state.held(layer, name), state.room(layer, name)
                kind = _FLOAT32 if buffer.tensor.float32 else self._state_type
                if read is None or state_name(layer, name) in read:
                    inputs[state_name(layer, name)] = held, kind
                binding.bind_output(new_state_name(layer, name), "cpu", 0, kind, room.shape, _address(room))
        for name, (array, kind) in inputs.items():
            binding.bind_input(name, "cpu", 0, kind, array.shape, _address(array))
        # onnxruntime keeps addresses; the arrays live as long as what keeps them.
        binding.kept = [array for array, _ in inputs.values()]
        return binding


_FLOAT32, _INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)

#: onnxruntime refuses a null address even for an empty tensor.
_NOWHERE = np.zeros(1, np.int64)


def _advance(tokens_BS: np.ndarray, lengths_B: np.ndarray | None) -> np.ndarray:
    """By how many tokens each sequence advances, [B]."""
    return np.full(len(tokens_BS), tokens_BS.shape[1]) if lengths_B is None else lengths_B


def _array(value: Any) -> np.ndarray:
    """A copy of an output; onnxruntime itself makes no bfloat16 arrays."""
    kind = ir.DataType(value.element_type())
    if kind != ir.DataType.BFLOAT16:
        return value.numpy()
    count = int(np.prod(value.shape()))
    return np.frombuffer(ctypes.string_at(value.data_ptr(), 2 * count), kind.numpy()).reshape(value.shape())


def _address(array: np.ndarray) -> int:
    return array.ctypes.data if array.size else _NOWHERE.ctypes.data


#: A portable graph and onnxruntime's own copy of it.
_COPIES = {PORTABLE: LOWERED_FOR_CPU, REMEMBERING: REMEMBERING_FOR_CPU}


def _graph(name: str, folder: Path, device: str, bodies: bool) -> onnx.ModelProto:
    """The form of a graph that a device runs, weights not loaded."""
    fast = device == "cpu" and not bodies
    graph = folder / (_COPIES[name] if fast else name)
    try:
        if fast:
            return onnx.load(graph, load_external_data=False)
        return ir.to_proto(bodies_for_cpu(graph) if device == "cpu" else with_bodies(graph))
    except Exception as error:  # protobuf's own errors have no common base
        raise BadInput(f"cannot read {graph}", str(error), "build it again") from error


def _session(
    name: str, taps: Sequence[str], folder: Path, device: str, threads: int, prepack: bool, bodies: bool
) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing_package("onnxruntime", "cpu", "running a graph") from error
    if device not in PROVIDERS:
        raise BadInput(f"unknown device {device!r}", f"known: {', '.join(PROVIDERS)}", "choose one of them")
    if PROVIDERS[device] not in ort.get_available_providers():
        raise NotSupported(
            f"this onnxruntime has no {PROVIDERS[device]}",
            f"it has {', '.join(ort.get_available_providers())}",
            "pip install 'v4export[gpu]' in place of v4export[cpu], on a machine with a GPU",
        )
    model = _graph(name, folder, device, bodies)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # The taps must reach the weights beside the file, so the folder is named and the graph given as bytes.
    settings = {**_EXACT, "session.model_external_initializers_file_folder_path": str(folder.resolve())}
    if not prepack:
        settings["session.disable_prepacking"] = "1"
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
    providers = list(dict.fromkeys([PROVIDERS[device], PROVIDERS["cpu"]]))
    own = [_PROVIDER_OPTIONS.get(name, {}) for name in providers]
    with _explained(folder):
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers, provider_options=own)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """onnxruntime's errors have no common base: their module, or plain ``RuntimeError`` while a graph runs."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime."):
            raise
        text = str(error).strip().splitlines()[0]
        if "alloc" in text:
            raise NotEnough(f"not enough memory to run {folder}", text, "use a machine with more") from error
        raise NotSupported(
            f"onnxruntime cannot run the graph of {folder}", text, "if the bundle is whole, please report this"
        ) from error
