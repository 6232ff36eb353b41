"""Ahead-of-time plugins, driven by TensorRT's own Python code as far as the parameters of their launch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from small_models import small

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.graphs.lower import lower_for_engine
from v4export.graphs.shards import Conversion, Placed, write
from v4export.plugins.kernels.emulate import compiler
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Launch
from v4export.units import Units

DRIVER = Path(__file__).with_name("aot_driver.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_bindings") is None, reason="no Python bindings of TensorRT"),
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
]
#: What the bindings ask of TensorRT's libraries, by name.
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
SHORT = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty libraries under the names that the bindings were linked with."""
    import importlib.metadata

    folder = tmp_path_factory.mktemp("stubs")
    major = importlib.metadata.version("tensorrt_cu13_bindings").split(".")[0]
    source = "\n".join(f'extern "C" void* {name}() {{ return nullptr; }}' for name in FUNCTIONS)
    for library in LIBRARIES:
        name = f"{library}.so.{major}"
        command = [
            str(compiler()),
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            f"-Wl,-soname,{name}",
            "-o",
            str(folder / name),
        ]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


def driven(preset: str, precision: str, stubs: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """What TensorRT's code makes of each kind of node of a model."""
    out = api.export(synth(small(preset), folder / "hub"), folder / "out", precision=precision).bundle.folder
    graph = out / "model.onnx"

    def written(conversions: Sequence[Conversion]) -> dict[str, Placed]:
        return write(conversions, Units(out), "tensorrt", lambda _: None)

    model, kept = lower_for_engine(graph, lambda _: True, PLAIN_SHARED, written)
    assert kept == {}
    ir.save(model, graph.with_suffix(".tensorrt.onnx"))
    command = [sys.executable, str(DRIVER), str(graph.with_suffix(".tensorrt.onnx")), str(stubs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield from (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


V3 = {"LatentAttentionSplit", "AttentionCombine", "MoeRoute", "ExpertSort", "ExpertUpFp8In1"}
V4 = {"SparseAttentionSplit", "HyperCollapse", "IndexTopK", "ExpertDownFp4In1", "CompressTokens"}
V41 = {"BlockMarks", "IndexRescore", "EngramGating", "SparseAttentionSinceSplit", "HyperShares"}


@pytest.mark.parametrize(
    ("preset", "precision", "among"),
    [("tiny-v3", "fp8", V3), ("tiny-v4-fp4", "mxfp4", V4), ("tiny-v4.1", "fp16", V41)],
    ids=["V3", "V4", "V4.1"],
)
def test_launches_are_those_of_the_nodes(
    preset: str, precision: str, among: set[str], stubs: Path, tmp_path: Path
) -> None:
    """Types, shapes, grid, block, shared memory and scalars that TensorRT would use are those that Python computes."""
    names = set()
    for found in driven(preset, precision, stubs, tmp_path):
        launch = Launch.parse(found["launch"])
        dims = {f"i{i}.{axis}": d for i, shape in enumerate(found["dims"]) for axis, d in enumerate(shape)}
        assert found["entry"] == launch.entry and f".entry {launch.entry}(" in found["ptx"]
        assert found["code"] == len(found["ptx"])
        assert found["outputs"] == [[d.evaluate(dims) for d in shape] for _, shape in launch.outputs]
        assert found["dtypes"] == [SHORT[dtype] for dtype, _ in launch.outputs]
        assert [found[f"grid_{axis}"] for axis in "xyz"] == [blocks.evaluate(dims) for blocks in launch.grid]
        assert (found["block_x"], found["block_y"], found["shared_mem"]) == (launch.threads, 1, launch.shared)
        assert found["scalars"] == [scalar.evaluate(dims) for scalar in launch.scalars]
        names.add(found["name"])
    assert among <= names
