"""Engines of a bundle, loaded: what they read and return, which profile a step fits, and contexts that run them."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from v4export.engine.admitted import check_engine
from v4export.engine.backend import cuda_devices, load_backend, package_version
from v4export.engine.log import Log, make_logger
from v4export.errors import BadInput, NotEnough, NotSupported
from v4export.graphs.export import PORTABLE, for_engine
from v4export.plugins.kernels import plugin_v3
from v4export.plugins.kernels.nodes import kernel_nodes
from v4export.runtime.on_device.device import Device, Fed, address

#: TensorRT's types -> PyTorch's.
TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
}
_LOG = logging.getLogger(__name__)
_ELSEWHERE = "run it with --executor onnxruntime, or build the engine again on this machine: v4export engine"

Shapes = Mapping[str, tuple[int, ...]]


class Heard(Log):
    """TensorRT's errors, which its functions do not return; nothing is printed, where text is."""

    def add(self, level: str, message: str) -> None:
        """Take one message; level is TensorRT's own name of it."""
        if level.endswith("ERROR"):
            self.errors = [*self.errors[-3:], message]
        elif level == "WARNING":
            _LOG.warning("TensorRT: %s", message)

    def last(self) -> str:
        """What went wrong, as far as it said."""
        found, self.errors = "; ".join(self.errors), []
        return found or "it does not say why"


@dataclass
class Runtime:
    """TensorRT on a device.

    Attributes:
        module: the package.
        device: where engines run.
        folder: of the bundle.
        engines: what the manifest says of them, by their graphs' names.
        cuda_graphs: whether decode steps are to be CUDA graphs.
        kept: what has to live as long as any engine.
        registered: kernels whose plugins it knows.
    """

    module: Any
    device: Device
    folder: Path
    engines: Mapping[str, Mapping[str, Any]]
    cuda_graphs: bool = True
    heard: Heard = field(default_factory=Heard)
    kept: list[Any] = field(default_factory=list)
    registered: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, folder: Path, engines: Mapping[str, Mapping[str, Any]], index: int = 0, cuda_graphs: bool = True
    ) -> Runtime:
        """What runs a bundle's engines on a CUDA device.

        Args:
            folder: of the bundle.
            engines: of its manifest.
            index: of the device.
            cuda_graphs: whether decode steps are to be CUDA graphs.

        Raises:
            NotSupported: there is no engine, device or package, or the engine is of another version.
        """
        report = _report(engines, PORTABLE)
        if not cuda_devices():
            raise NotSupported(
                "there is no CUDA device to run the engine on", fix="take --executor onnxruntime, or a machine with one"
            )
        if not torch.cuda.is_available():
            raise NotSupported(
                "this PyTorch cannot use the CUDA device, and holds what the engine reads",
                f"torch {torch.__version__}",
                "install PyTorch for CUDA: https://pytorch.org/get-started",
            )
        backend = load_backend(report["backend"], "Running an engine")
        version = package_version(backend.name) or backend.version
        if version != report["backend_version"]:
            raise NotSupported(
                "the engine is of another version of TensorRT, which reads its own alone",
                f"built by {backend.name} {report['backend_version']}, here is {version}",
                f"pip install {backend.name}=={report['backend_version']}, or build it again: v4export engine",
            )
        return cls(backend.module, Device(f"cuda:{index}"), folder, engines, cuda_graphs)

    @property
    def has_graphs(self) -> bool:
        """Whether the package makes CUDA graphs of steps by itself, as TensorRT-RTX does, and then no other can be."""
        return hasattr(self.module, "CudaGraphStrategy")

    def load(self, graph: str) -> Engine:
        """The engine of a graph.

        Raises:
            BadInput: its file is gone, or is not the one that was built.
            NotSupported: there is none, or it cannot be loaded on this device.
        """
        report = _report(self.engines, graph)
        path = check_engine(self.folder, report)
        trt = self.module
        if not self.kept:
            logger = make_logger(trt, self.heard)
            self.kept = [logger, trt.Runtime(logger)]
        if report.get("plugins") == "library":
            self._register(self.folder / for_engine(graph))
        with self.device.scope(), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self.kept[1].deserialize_cuda_engine(data)
        if engine is None:
            here = ", ".join(f"{one.name} ({one.capability})" for one in cuda_devices())
            targets = ", ".join(report["targets"])
            raise NotSupported(
                f"TensorRT cannot load {path.name} here",
                f"built for {targets}; here is {here or 'no GPU'}; {self.heard.last()}",
                _ELSEWHERE,
            )
        with self.device.scope():
            return Engine(self, engine, path.name)

    def _register(self, graph: Path) -> None:
        """Make known the plugins of a graph's kernels, those that are not yet; one without kernels has no such file."""
        names = {node.op_type for node in kernel_nodes(graph)} if graph.is_file() else set()
        if new := names - self.registered:
            self.kept.append(plugin_v3.register(self.module, sorted(new)))
            self.registered |= new


def _report(engines: Mapping[str, Mapping[str, Any]], graph: str) -> Mapping[str, Any]:
    if graph not in engines:
        raise NotSupported(
            f"the bundle has no engine of {graph}",
            f"it has those of {', '.join(engines)}" if engines else "it has none",
            "build it: v4export engine; or run it with --executor onnxruntime",
        )
    return engines[graph]


class Engine:
    """One engine.

    Attributes:
        reads, returns: its inputs and outputs, by name their types.
    """

    def __init__(self, runtime: Runtime, engine: Any, name: str) -> None:
        self._runtime, self._engine, self.name = runtime, engine, name
        self.device = runtime.device
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        input = runtime.module.TensorIOMode.INPUT
        types = {name: _type(name, engine.get_tensor_dtype(name)) for name in names}
        self.reads = {name: types[name] for name in names if engine.get_tensor_mode(name) == input}
        self.returns = {name: types[name] for name in names if name not in self.reads}
        dynamic = [name for name in self.reads if -1 in tuple(engine.get_tensor_shape(name))]
        self._bounds = [
            {name: _bounds(engine.get_tensor_profile_shape(name, profile)) for name in dynamic}
            for profile in range(engine.num_optimization_profiles)
        ]
        # All contexts run on one stream, one after the other, and so can share what they scribble on.
        self._scratch = self.device.empty((max(engine.device_memory_size_v2, 1),), torch.uint8)
        self._shared: dict[int, Context] = {}

    def most(self, name: str, axis: int) -> int:
        """The largest size of an input's dimension, of all profiles."""
        return max(bounds[name][1][axis] for bounds in self._bounds)

    def profile(self, shapes: Shapes) -> int:
        """The first profile that all shapes fit: of one token, the one for decoding.

        Raises:
            BadInput: there is none.
            NotSupported: the engine reads what is not there.
        """
        if lacking := self.reads.keys() - shapes.keys():
            raise _foreign(self.name, f"it reads {', '.join(sorted(lacking)[:3])}, which this model does not have")
        misfits = [list(self._misfits(bounds, shapes)) for bounds in self._bounds]
        for profile, misfit in enumerate(misfits):
            if not misfit:
                return profile
        raise BadInput(
            f"no optimisation profile of {self.name} is for this step",
            min(misfits, key=len)[0],
            "build the engine for it: --max-batch-size, --max-chunk, --max-seq-len or --maxShapes",
        )

    def _misfits(self, bounds: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], shapes: Shapes) -> Iterator[str]:
        for name, (least, most) in bounds.items():
            sizes = zip(least, shapes[name], most, strict=True)
            if not all(low <= size <= high for low, size, high in sizes):
                yield f"{name} is {list(shapes[name])}, a profile takes {list(least)} to {list(most)}"

    def context(self, profile: int) -> Context:
        """A context of its own, in scratch memory that all share."""
        context = self._engine.create_execution_context(self._how())
        if context is None:
            raise NotEnough(f"{self.name} cannot be run", self._runtime.heard.last(), "free memory of the device")
        context.set_device_memory(address(self._scratch), len(self._scratch))
        self.demand(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        return Context(self, context)

    def _how(self) -> Any:
        """What a context is made by."""
        trt = self._runtime.module
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not (self._runtime.cuda_graphs and self._runtime.has_graphs):
            return strategy
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config

    def shared_context(self, profile: int) -> Context:
        """The context of whoever needs none of their own."""
        if profile not in self._shared:
            self._shared[profile] = self.context(profile)
        return self._shared[profile]

    def run(
        self, inputs: Mapping[str, np.ndarray | torch.Tensor], outputs: Mapping[str, Any], fetched: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Run it once over arrays of the host and tensors of the device; as ``runtime.sessions.Session.run`` does."""
        assert not outputs
        with self.device.scope():
            here = {n: v for n, v in inputs.items() if n in self.reads and isinstance(v, np.ndarray)}
            fed = Fed(self.device, here)
            fed.feed(here)
            tensors = {n: v for n, v in inputs.items() if isinstance(v, torch.Tensor)} | fed.tensors
            context = self.shared_context(self.profile({name: tuple(v.shape) for name, v in tensors.items()}))
            found = context.bind(tensors)
            context.enqueue()
            return {name: self.device.fetch(found[name]) for name in fetched}

    def demand(self, succeeded: bool, what: str) -> None:
        """Raises NotSupported where TensorRT has refused something."""
        if not succeeded:
            raise NotSupported(f"TensorRT refuses {what} of {self.name}", self._runtime.heard.last(), _ELSEWHERE)


def _foreign(engine: str, why: str) -> NotSupported:
    return NotSupported(f"{engine} does not belong to this bundle", why, "build it: v4export engine")


def _type(name: str, dtype: Any) -> torch.dtype:
    spelt = str(dtype).rpartition(".")[2]
    if spelt not in TYPES:
        raise NotSupported("the engine has a tensor of another type", f"{name} is {spelt}", "build it: v4export engine")
    return TYPES[spelt]


def _bounds(shapes: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The least and the largest of a profile's three shapes."""
    return tuple(shapes[0]), tuple(shapes[2])


class Context:
    """An execution context: what it is bound to changes as little as it can, since every new shape costs time."""

    def __init__(self, engine: Engine, context: Any) -> None:
        self._engine, self._context = engine, context
        self._shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bind inputs by name, and new memory for all outputs, which is returned.

        Raises:
            NotSupported: the engine has inputs of other types, or refuses them.
        """
        engine = self._engine
        for name, dtype in engine.reads.items():
            tensor = inputs[name]
            if tensor.dtype != dtype:
                raise _foreign(engine.name, f"{name} is {tensor.dtype}, the engine reads {dtype}")
            if self._shapes.get(name) != (shape := tuple(tensor.shape)):
                engine.demand(self._context.set_input_shape(name, shape), f"the shape {list(shape)} of {name}")
                self._shapes[name] = shape
            self._place(name, tensor)
        outputs = {}
        for name, dtype in engine.returns.items():
            shape = tuple(self._context.get_tensor_shape(name))
            outputs[name] = engine.device.empty(shape, dtype)
            self._place(name, outputs[name])
        return outputs

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        self._engine.demand(self._context.set_tensor_address(name, address(tensor)), f"the address of {name}")

    def enqueue(self) -> None:
        """Put a step on the device's stream."""
        self._engine.demand(self._context.execute_async_v3(self._engine.device.stream), "a step")
