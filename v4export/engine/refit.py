"""An engine with the weights of another graph, without building it again; runs in the worker.

It takes a GPU, as everything does that loads an engine, and an engine that was built for it (``--refit``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx

from v4export.engine.log import Failed, Log


def same_but_weights(one: Path, other: Path) -> bool:
    """Whether two graphs differ in nothing but which bytes their weights are."""
    return _without_weights(one) == _without_weights(other)


def _without_weights(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        del weight.external_data[:]
    return model.SerializeToString(deterministic=True)


def refitted(trt: Any, logger: Any, built: Path, graph: str, out: Path, log: Log) -> str:
    """Writes the engine ``built`` with the weights of ``graph`` to ``out``. Returns the sha256.

    Raises:
        Failed: the engine cannot be loaded here, or does not take all of the weights.
    """
    engine = trt.Runtime(logger).deserialize_cuda_engine(built.read_bytes())
    if engine is None:
        raise Failed("refit", why="the engine cannot be loaded here", messages=log.errors)
    if not engine.refittable:
        raise Failed("refit", why="the engine was not built with --refit", messages=[])
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(graph):
        why = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise Failed("refit", why="it does not take the graph's weights", messages=why or log.errors)
    if missing := refitter.get_missing_weights():
        raise Failed("refit", why=f"{len(missing)} of its weights are in no graph", messages=missing[:5])
    if not refitter.refit_cuda_engine():
        raise Failed("refit", why="it does not take the graph's weights", messages=log.errors)
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    data = engine.serialize_with_config(config)
    out.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
