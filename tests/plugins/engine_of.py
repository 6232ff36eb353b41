"""Builds a model's engine with TensorRT-RTX, in a process of its own since TensorRT can end the one it runs in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

#: (least, likely, largest)
Size = tuple[int, int, int]


def builds(
    model: ir.Model,
    dims: Sequence[Sequence[str | int]],
    sizes: Mapping[str, Size],
    folder: Path,
    target: str = "sm89",
) -> None:
    """Asserts that there is an engine for the model.

    Args:
        model: of one node.
        dims: the inputs' dimensions, names of ``sizes`` or numbers.
        sizes: of each named dimension.
        folder: where files may be written.
        target: for which GPU.
    """
    pytest.importorskip("tensorrt_rtx")
    shapes = {}
    for value, named in zip(model.graph.inputs, dims, strict=True):
        value.shape = ir.Shape(named)
        bounds = [[sizes[d][i] if isinstance(d, str) else d for d in named] for i in range(3)]
        if bounds[0] != bounds[2]:
            shapes[value.name] = bounds
    onnx.save(ir.to_proto(model), folder / "model.onnx")
    request = {
        "onnx": str(folder / "model.onnx"),
        "engine": str(folder / "model.engine"),
        "workspace_bytes": 0,
        "precision": "fp32",
        "flags": [],
        "names_capabilities": True,
        "targets": [target],
        "inspect": False,
        "profiles": [{"name": "only", "shapes": shapes}],
    }
    done = subprocess.run([sys.executable, __file__, json.dumps(request)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (folder / "model.engine").stat().st_size > 1000


def _build(request: dict[str, Any]) -> None:
    import tensorrt_rtx as trt

    from v4export.engine.worker import Log, configure, make_logger, parse, write_plan

    log = Log()
    builder, network = parse(trt, make_logger(trt, log), request["onnx"], log)
    write_plan(trt, builder, network, configure(trt, builder, request), Path(request["engine"]), log)


if __name__ == "__main__":
    _build(json.loads(sys.argv[1]))
