"""Engines whose ops are launches of our kernels, built by TensorRT-RTX without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import small

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.engine.backend import plugin_environment
from v4export.engine.options import EngineOptions
from v4export.errors import NotSupported
from v4export.plugins.kernels.nodes import kernel_nodes

pytestmark = pytest.mark.slow
CASES = [("tiny-v3", "fp8", "sm89"), ("tiny-v4-fp4", "mxfp4", "sm120"), ("tiny-v4.1", "fp16", "sm80")]


@pytest.mark.parametrize(("preset", "precision", "target"), CASES)
def test_every_launch_is_a_layer_and_the_engine_holds_its_code(
    preset: str, precision: str, target: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = EngineOptions(targets=[target], backend="tensorrt_rtx", plugins="library", max_chunk=8)
    checkpoint = synth(small(preset), tmp_path / "hub")
    built = api.build(checkpoint, tmp_path / "out", precision=precision, max_seq_len=64, verify=False, engine=options)
    for name, report in built.engines.items():
        source = tmp_path / "out" / name.replace(".onnx", ".tensorrt.onnx")
        nodes = kernel_nodes(source)
        assert report.layers.get("PLUGIN_V3", 0) == len(nodes)
        assert (
            not nodes or ("every kernel is a plugin", f"{len(nodes)} plugins of {len(nodes)} launches") in report.proofs
        )
        plan = (tmp_path / "out" / report.path).read_bytes()
        for node in nodes:
            code = next(a.s for a in node.attribute if a.name == "ptx")
            assert code in plan, node.name
    assert any("PLUGIN_V3" in report.layers for report in built.engines.values())


def test_plugins_ahead_of_time_are_refused_before_any_work(tmp_path: Path) -> None:
    options = EngineOptions(backend="tensorrt_rtx", plugins="aot")
    with pytest.raises(NotSupported, match="ahead of time"):
        api.build(tmp_path / "nowhere", tmp_path / "out", engine=options)


def test_the_library_has_the_name_that_the_parser_asks_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    environment = plugin_environment("tensorrt_rtx", tmp_path)
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == str(tmp_path)
    assert (tmp_path / "libtensorrt_rtx.so").resolve().name.startswith("libtensorrt_rtx.so.")
    assert plugin_environment("no_such_package", tmp_path)["LD_LIBRARY_PATH"].startswith(str(tmp_path))
