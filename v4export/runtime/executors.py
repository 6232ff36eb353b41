"""What runs a bundle: one table of names, and how each is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from v4export.config import ModelConfig
from v4export.config.sharding import Sharding
from v4export.errors import BadInput, NotSupported
from v4export.precision import Precision

if TYPE_CHECKING:
    from v4export.runtime.generate import Executor

ONNXRUNTIME, TENSORRT = "onnxruntime", "tensorrt"


class Bundled(Protocol):
    """A bundle (``package.bundle.Bundle``), as far as running it goes."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    @property
    def config(self) -> ModelConfig:
        """The model."""

    @property
    def precision(self) -> Precision:
        """Of the graph."""

    @property
    def sharding(self) -> Sharding | None:
        """How it is shared among ranks."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What ``v4export.json`` says."""

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a sequence."""


@dataclass(frozen=True)
class Choice:
    """What is to run a bundle, and how.

    Attributes:
        executor: a name of ``EXECUTORS``.
        device: that onnxruntime runs on, ``cpu`` or ``cuda``.
        threads: of onnxruntime; 0 lets it choose.
        accuracy_level: of onnxruntime's products with integers (``runtime.sessions.Running``).
        cuda_graphs: whether TensorRT's decode steps are replayed as CUDA graphs.
        kernels: whether onnxruntime on a CPU runs this project's own (``plugins/cpu``).
        index: of the CUDA device that TensorRT runs on.
    """

    executor: str = ONNXRUNTIME
    device: str = "cpu"
    threads: int = 0
    accuracy_level: int = 0
    cuda_graphs: bool = True
    kernels: bool = False
    index: int = 0

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            known = ", ".join(EXECUTORS)
            raise BadInput(f"unknown executor {self.executor!r}", f"known: {known}", "choose one of them")
        if self.kernels and self.runs_on != "cpu":
            raise BadInput("these kernels are for a CPU", f"it is to run on {self.runs_on}", "leave --kernels out")

    @property
    def runs_on(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.executor == TENSORRT else self.device

    def open(self, bundle: Bundled) -> Executor:
        """The executor, with the bundle's graphs or engines loaded.

        Raises:
            BadInput, NotSupported: the bundle cannot be run so, and why.
        """
        return EXECUTORS[self.executor](bundle, self)


def _onnxruntime(bundle: Bundled, choice: Choice) -> Executor:
    from v4export.runtime.onnx import OnnxExecutor

    return OnnxExecutor(
        bundle.folder,
        bundle.config,
        bundle.precision,
        max_seq_len=bundle.max_seq_len,
        device=choice.device,
        threads=choice.threads,
        kernels=choice.kernels,
        accuracy_level=choice.accuracy_level,
        sharding=bundle.sharding,
    )


def _tensorrt(bundle: Bundled, choice: Choice) -> Executor:
    from v4export.runtime.on_device.executor import EngineExecutor
    from v4export.runtime.on_device.loaded import Runtime

    if bundle.sharding:
        raise NotSupported(
            "the engines of a shared model need communicators, which nothing here sets",
            f"the model is shared among {bundle.sharding.ranks} ranks",
            f"run it with --executor {ONNXRUNTIME}",
        )
    engines = bundle.manifest.get("engines") or {}
    runtime = Runtime.open(bundle.folder, engines, choice.index, choice.cuda_graphs)
    return EngineExecutor(runtime, bundle.config, bundle.precision, max_seq_len=bundle.max_seq_len)


EXECUTORS: dict[str, Callable[[Bundled, Choice], Executor]] = {ONNXRUNTIME: _onnxruntime, TENSORRT: _tensorrt}
