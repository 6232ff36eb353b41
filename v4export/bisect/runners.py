"""What runs pieces of graphs: onnxruntime over a bundle's, or polygraphy's runner over any."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from v4export.bisect.graph import Arrays, Execute, Graph, Run
from v4export.bisect.weights import embedded
from v4export.errors import BadInput, NotSupported, missing_package
from v4export.graphs.lower import bodies_for_cpu
from v4export.runtime.sessions import Running, Session


def opened(file: Path) -> onnx.ModelProto:
    """A graph, weights not loaded.

    Raises:
        BadInput: it is none.
    """
    try:
        return onnx.load(file, load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base
        raise BadInput(f"{file} is no ONNX graph", str(error), "give an .onnx file, or a bundle") from error


def of_bundle(folder: Path, name: str, portable: bool) -> Graph:
    """A graph of a bundle; pieces of a portable one run as their bodies say, 16 bits carried in float32."""

    def execute(model: onnx.ModelProto) -> Run:
        return _session(folder, ir.to_proto(bodies_for_cpu(model)) if portable else model)

    return Graph(opened(folder / name), execute, folder)


def _session(folder: Path, model: onnx.ModelProto) -> Run:
    session = Session(Running(folder, threads=1, prepack=False, log=4), model)
    names = [value.name for value in model.graph.output]
    return lambda given: session.run(given, {}, names)


def polygraphy(backend: str) -> Any:
    """A module of its, ``onnxrt`` or ``trt``; it tells no more than errors from here on."""
    try:
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise missing_package("polygraphy", "rtx", "bisecting foreign graphs and engines") from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return import_module(f"polygraphy.backend.{backend}")


def random_inputs(file: Path, seed: int, count: int) -> list[Arrays]:
    """What polygraphy makes up for a graph, so many times; axes that vary are 1."""
    backend = polygraphy("onnxrt")
    from polygraphy.comparator import DataLoader

    with backend.OnnxrtRunner(backend.SessionFromOnnx(str(file), providers=["cpu"])) as runner:
        inputs = runner.get_input_metadata(use_numpy_dtypes=False)
        return [dict(one) for one in DataLoader(seed=seed, iterations=count, input_metadata=inputs)]


def by_polygraphy(folder: Path) -> Execute:
    """Polygraphy's runner of onnxruntime, for a foreign graph whose weights lie in ``folder``."""
    backend = polygraphy("onnxrt")

    def execute(model: onnx.ModelProto) -> Run:
        load = backend.SessionFromOnnx(embedded(model, folder).SerializeToString(), providers=["cpu"])
        return lambda given: _inferred(backend.OnnxrtRunner(load), given)

    return execute


def by_tensorrt(folder: Path) -> Execute:
    """Polygraphy's runner of TensorRT, on this machine's GPU: an engine for each piece, of the shapes that it is given.

    Ops of the project are computed by their bodies.
    """
    if find_spec("tensorrt") is None:
        raise missing_package("tensorrt", "gpu", "running pieces of a graph as engines")
    backend = polygraphy("trt")

    def execute(model: onnx.ModelProto) -> Run:
        inlined = onnx.inliner.inline_local_functions(embedded(model, folder)).SerializeToString()

        def run(given: Arrays) -> dict[str, np.ndarray]:
            profile = backend.Profile()
            for name, array in given.items():
                profile.add(name, array.shape, array.shape, array.shape)
            network = backend.NetworkFromOnnxBytes(inlined, strongly_typed=True)
            engine = backend.EngineFromNetwork(network, config=backend.CreateConfig(profiles=[profile]))
            return _inferred(backend.TrtRunner(engine), given)

        return run

    return execute


def _inferred(runner: Any, given: Arrays) -> dict[str, np.ndarray]:
    """What one of polygraphy's runners makes of inputs."""
    try:
        with runner:
            return {name: np.asarray(array) for name, array in runner.infer(dict(given)).items()}
    except Exception as error:  # its own, and those of what it runs, have no common base
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise NotSupported("a piece of the graph cannot be run", said[0]) from error
