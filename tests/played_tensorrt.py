"""TensorRT as far as running engines goes, played by onnxruntime, and PyTorch's CUDA graphs, played on a CPU.

An engine is a file of JSON: the graph that it was built of, and its profiles, which are those that a build derives. A
context computes over the addresses that it was given, and holds its caller to what TensorRT asks for.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from v4export.engine.profiles import derive_profiles, input_dims
from v4export.graphs.export import engine_precisions
from v4export.package.bundle import Bundle
from v4export.runtime.on_device.device import Device
from v4export.runtime.on_device.executor import EngineExecutor
from v4export.runtime.on_device.loaded import Runtime
from v4export.runtime.sessions import Running, Session

TYPES = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.dtype(np.float32)),
    onnx.TensorProto.FLOAT16: ("HALF", np.dtype(np.float16)),
    onnx.TensorProto.BFLOAT16: ("BF16", np.dtype(ml_dtypes.bfloat16)),
    onnx.TensorProto.FLOAT8E4M3FN: ("FP8", np.dtype(ml_dtypes.float8_e4m3fn)),
    onnx.TensorProto.INT64: ("INT64", np.dtype(np.int64)),
}
DataType = Enum("DataType", [name for name, _ in TYPES.values()])
VERSION = "11.4.0"


def engine_executor(package: TensorRT, bundle: Bundle, cuda_graphs: bool = True) -> EngineExecutor:
    """Over the engines of a bundle, on a CPU."""
    runtime = Runtime(package, Device("cpu"), bundle.folder, bundle.manifest["engines"], cuda_graphs)
    return EngineExecutor(runtime, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len)


def with_engines(bundle: Bundle, *, max_batch: int = 4, max_chunk: int = 48, max_seq_len: int | None = None) -> Bundle:
    """The bundle as if engines had been built of its graphs."""
    engines = {}
    for name in engine_precisions(bundle.folder, bundle.config, bundle.precision):
        steps = bundle.config.reasoning.steps if bundle.config.reasoning else 1
        sizes = {"max_batch": max_batch, "max_chunk": max_chunk, "max_steps": steps}
        graph = bundle.folder / name
        profiles = derive_profiles(input_dims(graph), max_seq_len=max_seq_len or bundle.max_seq_len, **sizes)
        plan = {"graph": str(graph), "profiles": [asdict(one) for one in profiles]}
        engine = graph.with_suffix(".engine")
        engine.write_text(json.dumps(plan))
        engines[name] = {
            "path": engine.name,
            "bytes": engine.stat().st_size,
            "sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
            "backend": "tensorrt",
            "backend_version": VERSION,
            "targets": ["sm90"],
            "plugins": "aot",
            "max_batch": max_batch,
        }
    return replace(bundle, manifest={**bundle.manifest, "engines": engines})


@dataclass
class Counted:
    """What was asked of contexts and graphs."""

    contexts: int = 0
    by_itself: int = 0
    enqueued: int = 0
    reshaped: int = 0
    captured: int = 0
    replayed: int = 0
    profiles: list[int] = field(default_factory=list)


class TensorRT:
    """The package. ``loads``: whether engines can be loaded here; ``captures``: whether steps can be captured; ``rtx``:
    whether it is the one that makes CUDA graphs by itself.
    """

    ILogger = type("ILogger", (), {})
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")

    def __init__(self, loads: bool = True, captures: bool = True, rtx: bool = False) -> None:
        if rtx:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")
        self.loads, self.captures, self.counted = loads, captures, Counted()

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._loaded(logger, bytes(data)))

    def _loaded(self, logger: Any, data: bytes) -> Engine | None:
        if not self.loads:
            logger.log("Severity.ERROR", "the engine plan file is not compatible")
            return None
        return Engine(self, json.loads(data))


class Engine:
    device_memory_size_v2 = 1000

    def __init__(self, package: TensorRT, plan: dict[str, Any]) -> None:
        graph = Path(plan["graph"])
        self.package = package
        self.session = Session(Running(graph.parent, threads=1), graph.name)
        proto = onnx.load(graph, load_external_data=False).graph
        values = {value.name: value.type.tensor_type for value in (*proto.input, *proto.output)}
        self.inputs = [value.name for value in proto.input]
        self.types = {name: TYPES[value.elem_type] for name, value in values.items()}
        self.dims = {
            name: tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.shape.dim)
            for name, value in values.items()
        }
        self.profiles = [profile["shapes"] for profile in plan["profiles"]]
        self.num_optimization_profiles, self.num_io_tensors = len(self.profiles), len(values)

    def get_tensor_name(self, i: int) -> str:
        return [*self.dims][i]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.types[name][0]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [dim if isinstance(dim, int) else -1 for dim in self.dims[name]]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self.profiles[profile][name]

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy="DISABLED", strategy="STATIC")
        config.set_execution_context_allocation_strategy = partial(setattr, config, "strategy")
        return config

    def create_execution_context(self, how: Any) -> Context:
        by_itself = not isinstance(how, str)
        assert (how.strategy if by_itself else how) == "USER_MANAGED"
        self.package.counted.by_itself += by_itself and how.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE"
        self.package.counted.contexts += 1
        return Context(self)


class Context:
    """Refuses what TensorRT refuses, and asserts what it leaves undefined."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.counted = engine, engine.package.counted
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.scratch, self.settled = 0, False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory and size >= self.engine.device_memory_size_v2
        self.scratch = memory

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return 0 <= profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None and name in self.engine.inputs
        bounds = self.engine.profiles[self.profile].get(name)
        low, _, high = bounds if bounds else [self.engine.dims[name]] * 3
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name], self.settled = shape, False
        self.counted.reshaped += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if not memory or memory % 64:
            return False
        self.addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> list[int]:
        """Of an output, by the letters of its dimensions, which inputs give their sizes."""
        sizes = {}
        for one in self.engine.inputs:
            sizes |= {d: n for d, n in zip(self.engine.dims[one], self.shapes[one], strict=True) if isinstance(d, str)}

        def size(dim: str | int) -> int:
            if isinstance(dim, int) or dim in sizes:
                return dim if isinstance(dim, int) else sizes[dim]
            letter, operation, number = dim[0], dim[1], int(dim[2:])
            return sizes[letter] + number if operation == "+" else -(-sizes[letter] // number)

        return [size(dim) for dim in self.engine.dims[name]]

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        assert self.scratch and self.addresses.keys() == engine.dims.keys() and self.shapes.keys() == {*engine.inputs}
        arrays = {name: self._array(name) for name in engine.dims}

        def compute() -> None:
            self.counted.enqueued += 1
            inputs = {name: arrays[name] for name in engine.inputs}
            engine.session.run(inputs, {n: a for n, a in arrays.items() if n not in inputs})

        if Recorder.now is None:
            self.settled = True
            self.counted.profiles.append(self.profile)
            compute()
            return True
        # New shapes change what lies in a context, which a capture must not see happen.
        assert self.settled, "captured before the shapes were run once"
        if engine.package.captures:
            Recorder.now.calls.append(compute)
        return engine.package.captures

    def _array(self, name: str) -> np.ndarray:
        shape = self.shapes.get(name) or tuple(self.get_tensor_shape(name))
        dtype = self.engine.types[name][1]
        bytes = int(np.prod(shape)) * dtype.itemsize
        if not bytes:
            return np.zeros(shape, dtype)
        return np.frombuffer((ctypes.c_uint8 * bytes).from_address(self.addresses[name]), dtype).reshape(shape)


class Recorder(TorchDispatchMode):
    """While it is entered, PyTorch's operations are written down and not done, as in a capture."""

    now: Recorder | None = None

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.counted = counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "view" in str(function) or "slice" in str(function):
            return function(*args, **(kwargs or {}))
        self.calls.append(lambda: function(*args, **(kwargs or {})))
        return args[0]

    def replay(self) -> None:
        self.counted.replayed += 1
        for call in self.calls:
            call()


@contextlib.contextmanager
def played_cuda_graphs(package: TensorRT) -> Iterator[Counted]:
    """``torch.cuda.CUDAGraph`` and ``torch.cuda.graph``, over a CPU's tensors."""

    @contextlib.contextmanager
    def capturing(graph: Recorder, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        Recorder.now = graph
        try:
            with graph:
                yield
        finally:
            Recorder.now = None
        package.counted.captured += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Recorder(package.counted))
        patch.setattr(torch.cuda, "graph", capturing)
        yield package.counted
