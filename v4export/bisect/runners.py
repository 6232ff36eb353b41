"""What runs pieces of graphs: onnxruntime over a bundle's, or polygraphy's runner over any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_model

from v4export.bisect.graph import Arrays, Execute, Graph, Run
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


def embedded(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy with its weights inside."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        load_external_data_for_model(copy, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BadInput(f"the weights of a graph in {folder} cannot be read", str(error), "make it whole") from error
    return copy


def by_polygraphy(folder: Path) -> Execute:
    """Polygraphy's runner of onnxruntime, for a foreign graph whose weights lie in ``folder``."""
    try:
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    except ImportError as error:
        raise missing_package("polygraphy", "rtx", "bisecting foreign graphs") from error

    def execute(model: onnx.ModelProto) -> Run:
        serialized = embedded(model, folder).SerializeToString()
        load = SessionFromOnnx(serialized, providers=["cpu"])

        def run(given: Arrays) -> dict[str, np.ndarray]:
            try:
                with OnnxrtRunner(load) as runner:
                    return {name: np.asarray(array) for name, array in runner.infer(dict(given)).items()}
            except Exception as error:  # its own, and those of onnxruntime, have no common base
                raise NotSupported("onnxruntime cannot run a piece", str(error).strip().splitlines()[0]) from error

        return run

    return execute
