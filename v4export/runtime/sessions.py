"""onnxruntime sessions over a bundle's graphs, and arrays bound to them where they lie."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from v4export.errors import BadInput, NotEnough, NotSupported, missing_package
from v4export.graphs.admitted import admit
from v4export.graphs.export import for_cpu
from v4export.graphs.kept import graph_for_kernels
from v4export.graphs.lower import bodies_for_cpu, with_bodies
from v4export.graphs.passes.accuracy import LEVELS, set_accuracy
from v4export.plugins.cpu import library

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

#: ``ENABLE_ALL`` turns dequantise-and-multiply into products with int8 activations, an error of 1e-2. Level 0 keeps
#: activations in their own type.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}

#: At ``fp32``, onnxruntime's experts of eight bits take activations as they are; it has no other way to say so.
_EXPERTS = "ORT_QMOE_CPU_QNBIT_GEMM"

#: A GPU multiplies float32 as TF32 unless told not to, which is an error of 6e-4.
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}

#: onnxruntime refuses a null address even for an empty tensor.
_NOWHERE = np.zeros(1, np.int64)


OnRun = Callable[[str, Mapping[str, np.ndarray]], None]


@dataclass(frozen=True)
class Running:
    """How the graphs of a bundle are run.

    Attributes:
        folder: of the bundle.
        device: ``cpu`` or ``cuda``.
        threads: of onnxruntime; 0 lets it choose.
        prepack: let onnxruntime keep a copy of the weights in its kernels' layout: faster prefill, twice the memory.
        bodies: on a CPU, run the portable graphs' own bodies in place of the fast copies.
        kernels: on a CPU, run the portable graphs by this project's own kernels, which are compiled when first needed.
        accuracy_level: of products with integer matrices in the fast copies, by onnxruntime's numbers: 0 multiplies
            activations as they are, 4 rounds them to eight bits, which is faster and takes ``prepack``.
        log: least severity that onnxruntime's own log tells; 4 keeps even why a graph cannot run to the error raised.
        on_run: told the name of each graph that is about to run, and its inputs by name, which may be overwritten then.
    """

    folder: Path
    device: str = "cpu"
    threads: int = 0
    prepack: bool = True
    bodies: bool = False
    kernels: bool = False
    accuracy_level: int = 0
    log: int = 3
    on_run: OnRun | None = None


class Session:
    """One graph of a bundle, or a segment of one.

    Args:
        how: it is run.
        graph: its portable name, or the graph itself.
        taps: names of values inside it to be returned by every run as well.

    Attributes:
        reads: names of its inputs.
        returns: names of its outputs, without the taps.
    """

    def __init__(self, how: Running, graph: str | onnx.ModelProto, taps: Sequence[str] = ()) -> None:
        self._folder, self._taps = how.folder, tuple(taps)
        self._name, self._on_run = graph if isinstance(graph, str) else "", how.on_run
        model = graph_to_run(how, graph) if isinstance(graph, str) else graph
        self.returns = [value.name for value in model.graph.output]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps)
        self._session = _session(how, model)
        self.reads = {value.name for value in self._session.get_inputs()}

    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], fetched: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run it over arrays, which are read and written where they lie; they have to be contiguous.

        Args:
            inputs: by name; those that the graph does not read are left out.
            outputs: where it is to write, by name.
            fetched: outputs to be returned, besides the taps.
        """
        if self._on_run:
            self._on_run(self._name, {name: array for name, array in inputs.items() if name in self.reads})
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if name in self.reads:
                binding.bind_input(name, "cpu", 0, _kind(array), array.shape, _address(array))
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, _kind(array), array.shape, _address(array))
        returned = (*fetched, *self._taps)
        for name in returned:
            binding.bind_output(name, "cpu")
        with _explained(self._folder):
            self._session.run_with_iobinding(binding)
        values = binding.get_outputs()[len(outputs) :]
        return {name: _array(value) for name, value in zip(returned, values, strict=True)}


def _kind(array: np.ndarray) -> int:
    return int(ir.DataType.from_numpy(array.dtype))


def _array(value: Any) -> np.ndarray:
    """A copy of an output; onnxruntime itself makes no bfloat16 or FP8 arrays."""
    kind = ir.DataType(value.element_type())
    if kind not in (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
        return value.numpy()
    bytes = int(np.prod(value.shape())) * kind.numpy().itemsize
    return np.frombuffer(ctypes.string_at(value.data_ptr(), bytes), kind.numpy()).reshape(value.shape())


def _address(array: np.ndarray) -> int:
    return array.ctypes.data if array.size else _NOWHERE.ctypes.data


def graph_to_run(how: Running, name: str) -> onnx.ModelProto:
    """The form of a graph that a device runs, weights not loaded."""
    fast = how.device == "cpu" and not how.bodies and not how.kernels
    graph = how.folder / (for_cpu(name) if fast else name)
    admit(graph)
    try:
        if fast:
            model = ir.load(graph)
            set_accuracy(model, how.accuracy_level)
            return ir.to_proto(model)
        if how.kernels:
            return graph_for_kernels(graph)
        return ir.to_proto(bodies_for_cpu(graph) if how.device == "cpu" else with_bodies(graph))
    except Exception as error:  # protobuf's own errors have no common base
        raise BadInput(f"cannot read {graph}", str(error), "build it again") from error


def _session(how: Running, model: onnx.ModelProto) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise missing_package("onnxruntime", "cpu", "running a graph") from error
    if how.device not in PROVIDERS:
        raise BadInput(f"unknown device {how.device!r}", f"known: {', '.join(PROVIDERS)}", "choose one of them")
    if how.accuracy_level not in LEVELS:
        known = ", ".join(map(str, LEVELS))
        raise BadInput(f"unknown accuracy level {how.accuracy_level}", f"known: {known}", "choose one of them")
    if PROVIDERS[how.device] not in ort.get_available_providers():
        raise NotSupported(
            f"this onnxruntime has no {PROVIDERS[how.device]}",
            f"it has {', '.join(ort.get_available_providers())}",
            "pip install 'v4export[gpu]' in place of v4export[cpu], on a machine with a GPU",
        )
    options = ort.SessionOptions()
    options.log_severity_level = how.log
    options.intra_op_num_threads = how.threads
    # The taps must reach the weights beside the file, so the folder is named and the graph given as bytes.
    settings = {**_EXACT, "session.model_external_initializers_file_folder_path": str(how.folder.resolve())}
    if not how.prepack:
        settings["session.disable_prepacking"] = "1"
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    if how.kernels:
        options.register_custom_ops_library(str(_kernels()))
    providers = list(dict.fromkeys([PROVIDERS[how.device], PROVIDERS["cpu"]]))
    own = [_PROVIDER_OPTIONS.get(name, {}) for name in providers]
    with _explained(how.folder), _experts_exact(how.accuracy_level == 0):
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers, provider_options=own)


def _kernels() -> Path:
    try:
        return library()
    except RuntimeError as error:
        raise NotSupported("there are no kernels for this CPU", str(error), "run it without --kernels") from error


@contextlib.contextmanager
def _experts_exact(exact: bool) -> Iterator[None]:
    """Onnxruntime's experts take activations as they are in sessions made within; it looks when it makes one."""
    before = os.environ.get(_EXPERTS)
    if exact:
        os.environ[_EXPERTS] = "fp32"
    try:
        yield
    finally:
        if exact and before is None:
            del os.environ[_EXPERTS]
        elif exact and before is not None:
            os.environ[_EXPERTS] = before


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """onnxruntime's errors have no common base: their module, or plain ``RuntimeError`` while a graph runs."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("onnxruntime."):
            raise
        text = str(error).strip().splitlines()[0]
        # Not every message with "alloc" in it: that of a result of a wrong shape speaks of where it was to be put.
        if "alloc" in text and "allocated" not in text:
            raise NotEnough(f"not enough memory to run {folder}", text, "use a machine with more") from error
        raise NotSupported(
            f"onnxruntime cannot run the graph of {folder}", text, "if the bundle is whole, please report this"
        ) from error
