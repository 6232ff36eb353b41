"""What runs pieces of graphs: onnxruntime over a bundle's, or polygraphy's runner over any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
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


def polygraphy() -> Any:
    """Its module of onnxruntime, which from here on tells errors only."""
    try:
        from polygraphy.backend import onnxrt
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise missing_package("polygraphy", "rtx", "bisecting foreign graphs") from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return onnxrt


def random_inputs(file: Path, seed: int, count: int) -> list[Arrays]:
    """What polygraphy makes up for a graph, so many times; axes that vary are 1."""
    from polygraphy.comparator import DataLoader

    backend = polygraphy()
    with backend.OnnxrtRunner(backend.SessionFromOnnx(str(file), providers=["cpu"])) as runner:
        loader = DataLoader(seed=seed, iterations=count, input_metadata=runner.get_input_metadata())
        return [dict(one) for one in loader]


def by_polygraphy(folder: Path) -> Execute:
    """Polygraphy's runner of onnxruntime, for a foreign graph whose weights lie in ``folder``."""
    backend = polygraphy()

    def execute(model: onnx.ModelProto) -> Run:
        serialized = embedded(model, folder).SerializeToString()
        load = backend.SessionFromOnnx(serialized, providers=["cpu"])

        def run(given: Arrays) -> dict[str, np.ndarray]:
            try:
                with backend.OnnxrtRunner(load) as runner:
                    return {name: np.asarray(array) for name, array in runner.infer(dict(given)).items()}
            except Exception as error:  # its own, and those of onnxruntime, have no common base
                raise NotSupported("onnxruntime cannot run a piece", str(error).strip().splitlines()[0]) from error

        return run

    return execute
