"""The smallest case that shows a parting: a graph of what differs, its inputs, and what should come of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from v4export.bisect.difference import Difference, difference
from v4export.bisect.graph import Graph
from v4export.bisect.runners import opened
from v4export.bisect.search import Parting
from v4export.bisect.weights import embedded
from v4export.errors import BadInput, NumbersDiffer, missing_package
from v4export.graphs.lower import bodies_for_cpu
from v4export.plain import to_json

MODEL, INPUTS, EXPECTED, FACTS = "model.onnx", "inputs.npz", "expected.npz", "case.json"
#: Beyond this, which a protobuf message cannot hold much more than, weights are a file of their own.
_INSIDE = 1 << 30
#: Types that NumPy's files and most programs lack: in a case they are float32, which holds all of them.
_NARROW = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)))


def write_case(folder: Path, graph: Graph, parting: Parting, portable: bool, facts: Mapping[str, Any]) -> None:
    """Write a parting into a folder that is there.

    ``model.onnx`` is what the other graph has between the cuts, in standard operators where it is a portable graph.
    """
    targets = [one.value for one in parting.differences if one.value in graph.maker]
    model = embedded(graph.piece(targets, parting.given), graph.folder)
    _in_float32(model, {name: graph.dtype(name, parting.wanted[name].dtype) for name in targets})
    model = ir.to_proto(bodies_for_cpu(model)) if portable else model
    large = model.ByteSize() > _INSIDE
    onnx.save(model, folder / MODEL, save_as_external_data=large, location="weights.bin")
    inputs, expected = (_wide(arrays) for arrays in (parting.given, {n: parting.wanted[n] for n in targets}))
    _save(folder / INPUTS, inputs)
    _save(folder / EXPECTED, expected)
    _for_polygraphy(folder, inputs, expected)
    (folder / FACTS).write_text(to_json({**facts, "error": parting.error}) + "\n")


def _save(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    given: dict[str, Any] = dict(arrays)
    np.savez(file, **given)


def polygraphy_command(folder: Path) -> str | None:
    """What shows a case with polygraphy, where its inputs were written for that."""
    if not (folder / "inputs.json").exists():
        return None
    model, inputs, expected = (folder / name for name in (MODEL, "inputs.json", "expected.json"))
    words = ["polygraphy", "run", model, "--onnxrt", "--load-inputs", inputs, "--load-outputs", expected]
    return shlex.join(map(str, [*words, "--check-error-stat", "mean"]))


def _for_polygraphy(folder: Path, inputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    try:
        from polygraphy.comparator import IterationResult, RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
    except ImportError:
        return
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        save_json([dict(inputs)], str(folder / "inputs.json"))
        results = RunResults()
        results.append(("expected", [IterationResult(dict(expected), runner_name="expected")]))
        results.save(str(folder / "expected.json"))


def _wide(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a.astype(np.float32) if a.dtype in _NARROW else a for name, a in arrays.items()}


def _in_float32(model: onnx.ModelProto, results: Mapping[str, ir.DataType]) -> None:
    """Take inputs of narrow types, and return results, whose types are given, as float32."""
    graph = model.graph
    narrow = {ir.DataType.from_numpy(dtype) for dtype in _NARROW}
    for value in graph.input:
        kind = value.type.tensor_type.elem_type
        if kind in narrow:
            name, value.name = value.name, f"{value.name}.given"
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            graph.node.insert(0, helper.make_node("Cast", [value.name], [name], name=f"narrow.{name}", to=kind))
    own = {name: f"{name}.own" for name, kind in results.items() if kind in narrow}
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = own.get(name, name)
    for name, inner in own.items():
        graph.node.append(helper.make_node("Cast", [inner], [name], name=f"wide.{name}", to=onnx.TensorProto.FLOAT))


@dataclass(frozen=True)
class Replayed:
    """A case, run again.

    Attributes:
        facts: what was written about it.
        differences: of its results.
    """

    facts: Mapping[str, Any]
    differences: tuple[Difference, ...]

    def text(self) -> str:
        """For people."""
        lines = [f"node {self.facts['node']} ({self.facts['op_type']}) of {self.facts['graph']}"]
        return "\n".join([*lines, *(one.line() for one in self.differences)])

    def check(self) -> None:
        """Raise NumbersDiffer where a result is beyond its limit."""
        bad = [one for one in self.differences if not one.ok]
        if bad:
            raise NumbersDiffer(f"node {self.facts['node']} does not make what is expected", bad[0].line())


def replay(folder: Path) -> Replayed:
    """Run a case again, by onnxruntime.

    Raises:
        BadInput: the folder is no case.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        inputs, expected = (dict(np.load(folder / name, allow_pickle=False)) for name in (INPUTS, EXPECTED))
        error = float(facts["error"])
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise BadInput(f"{folder} is not a case", str(wrong), "make one with v4export bisect -o DIR") from wrong
    opened(folder / MODEL)
    try:
        import onnxruntime
    except ImportError as wrong:
        raise missing_package("onnxruntime", "cpu", "running a case") from wrong
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        found = dict(zip(expected, session.run(list(expected), inputs), strict=True))
    except Exception:  # its errors have no common base; that it cannot be run is what the case shows
        found = {}
    compared = [difference(name, found.get(name), wanted, error) for name, wanted in expected.items()]
    return Replayed(facts, tuple(compared))
