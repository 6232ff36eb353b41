from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from engine_graphs import (
    cached_model,
    dequantize,
    dequantize_function,
    experts_loop,
    fp4_linear,
    fp8_linear,
    linear,
    model,
    node,
    save,
    tensor,
    value,
)
from onnx import TensorProto, numpy_helper

from v4export.engine.build import build_engine
from v4export.engine.evidence import read_plan
from v4export.engine.profiles import ShapeOverride
from v4export.errors import BadInput, NotEnough, NotSupported
from v4export.precision import PRECISIONS

pytest.importorskip("tensorrt_rtx")
SIZES = {"max_batch": 2, "max_seq_len": 64, "max_chunk": 8, "backend": "tensorrt_rtx"}


def build(proto, folder: Path, precision: str, external: bool = False, **options):
    options = {"precision": PRECISIONS[precision], **SIZES, **options}
    return build_engine(save(proto, folder, external), folder / "m.engine", **options)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("precision", "target"), [("fp32", "sm80"), ("fp16", "sm86"), ("bf16", "rtx4090")])
def test_precisions(tmp_path, precision, target):
    report = build(linear(precision), tmp_path, precision, targets=[target])
    data = (tmp_path / "m.engine").read_bytes()
    assert (report.bytes, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert read_plan(report.path).targets == report.targets
    assert report.layers["MATRIX_MULTIPLY"] == 1 and report.weights_mib > 0 and report.peak_mib > 0
    claims = [claim for claim, _ in report.proofs]
    assert f"matrix layers compute in {precision}" in claims and f"weights are stored as {precision}" in claims
    assert left(tmp_path) == ["m.engine", "model.onnx"]


@pytest.mark.parametrize("transpose", [False, True])
def test_fp8_blocks_stay_fp8(tmp_path, transpose):
    proto = fp8_linear(transpose=transpose)
    report = build(proto, tmp_path, "fp8", external=True)
    weights = 1200 * 1088
    assert report.targets == ("sm89", "sm120", "sm121")
    assert report.layers["DEQUANTIZE"] == 1
    assert weights < report.bytes < weights + 2**20
    assert dict(report.proofs)["weights are stored as fp8"].startswith("constants in the plan: fp8_e4m3")


def test_fp4_blocks_stay_fp4(tmp_path):
    rows, columns = 1024, 2048
    report = build(fp4_linear(rows, columns), tmp_path, "mxfp4", external=True)
    stored = rows * columns // 2 + rows * columns // 32 * 2
    assert report.targets == ("sm120", "sm121")
    assert report.layers["DEQUANTIZE"] == 1
    assert stored < report.bytes < stored + 2**20
    assert dict(report.proofs)["weights are stored as fp4"].startswith("constants in the plan: fp4_e2m1")


def test_fp4_for_a_gpu_without_it(tmp_path):
    with pytest.raises(BadInput, match="has no mxfp4"):
        build(fp4_linear(), tmp_path, "mxfp4", targets=["sm89"])
    with pytest.raises(BadInput, match=r"cannot be compiled for sm89\n.*fp4_e2m1"):
        build(fp4_linear(), tmp_path, "bf16", targets=["sm89"])
    with pytest.raises(BadInput, match="mxfp4 was asked for, and the graph does not use it"):
        build(fp8_linear(), tmp_path, "mxfp4")
    assert left(tmp_path) == ["model.onnx"]


def test_repeated_builds_are_identical(tmp_path):
    onnx_file = save(fp8_linear(256, 384), tmp_path)
    options = {"precision": PRECISIONS["fp8"], "targets": ["sm89"], **SIZES}
    built = [build_engine(onnx_file, tmp_path / name, **options) for name in "ab"]
    assert built[0].sha256 == built[1].sha256


def test_experts_in_a_loop(tmp_path):
    lines: list[str] = []
    report = build(experts_loop(), tmp_path, "fp16", targets=["sm86"], log=tmp_path / "log", on_line=lines.append)
    assert report.layers["TRIP_LIMIT"] and report.layers["CONDITION"] == 2
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_state_contract_with_both_profiles(tmp_path):
    report = build(cached_model(), tmp_path, "bf16", external=True)
    assert report.targets == ("sm80", "sm86", "sm89", "sm120", "sm121")
    assert report.dtypes["BF16"] > report.dtypes["FLOAT"] > 0


def test_workspace_that_is_too_small(tmp_path):
    with pytest.raises(NotEnough, match="workspace limit"):
        build(fp8_linear(), tmp_path, "fp8", workspace_gib=1e-6)


def test_own_shapes(tmp_path):
    given = ShapeOverride(min={"x": (1, 1, 256)}, opt={"x": (1, 2, 256)}, max={"x": (2, 4, 256)})
    assert build(linear("fp16"), tmp_path, "fp16", targets=["sm86"], shapes=given, workspace_gib=0.5).bytes


def test_fp8_for_a_gpu_without_it(tmp_path):
    with pytest.raises(BadInput, match="sm86"):
        build(fp8_linear(), tmp_path, "fp8", targets=["sm86"])
    assert left(tmp_path) == ["model.onnx"]


def test_fp8_hidden_in_another_precision_is_found_by_the_builder(tmp_path):
    with pytest.raises(BadInput, match=r"cannot be compiled for sm86\n.*fp8_e4m3"):
        build(fp8_linear(), tmp_path, "bf16", targets=["sm86", "sm89"])
    assert left(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(("graph", "asked"), [("fp16", "fp8"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_precision_the_graph_does_not_use(tmp_path, graph, asked):
    with pytest.raises(BadInput, match=f"{asked} was asked for, and the graph does not use it"):
        build(linear(graph), tmp_path, asked)
    assert left(tmp_path) == ["model.onnx"]


def test_unused_input_is_an_error(tmp_path):
    proto = linear("fp16")
    proto.graph.input.append(value("forgotten", TensorProto.FLOAT16, ["B", 4]))
    with pytest.raises(NotSupported, match="Unused Input: forgotten"):
        build(proto, tmp_path, "fp16")
    assert left(tmp_path) == ["model.onnx"]


def test_operator_that_is_not_read(tmp_path):
    x, y = value("x", TensorProto.FLOAT16, ["B", 8]), value("y", TensorProto.INT64, [2, "N"])
    proto = model([node("NonZero", ["x"], ["y"])], [x], [y], [])
    with pytest.raises(NotSupported, match=r"cannot read NonZero\n.*node NonZero_y, op NonZero: ") as e:
        build(proto, tmp_path, "fp16")
    assert e.value.exit_code == 4


def test_attention_whose_lengths_would_be_dropped(tmp_path):
    x, y = (value(name, TensorProto.FLOAT16, [1, 2, 8, 64]) for name in "xy")
    lengths = value("n", TensorProto.INT64, [1])
    proto = model([node("Attention", ["x", "x", "x", "", "", "", "n"], ["y"])], [x, lengths], [y], [])
    with pytest.raises(NotSupported, match=r"SIG|Unused Input|part of the graph"):
        build(proto, tmp_path, "fp16")
    assert left(tmp_path) == ["model.onnx"]


def test_file_that_is_missing(tmp_path):
    with pytest.raises(BadInput, match="no ONNX file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "m.engine", precision=PRECISIONS["fp16"])


def child() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if "v4export.engine.worker" in " ".join(p.cmdline())]
    return found


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [(signal.SIGKILL, NotEnough, "was killed"), (signal.SIGSEGV, NotSupported, r"crashed .*\n.*SIGSEGV")],
)
def test_killed_child_leaves_nothing(tmp_path, sent, error, message):
    def kill(line: str) -> None:
        if not done:
            done.append(child())
            done[0].send_signal(sent)

    done: list[psutil.Process] = []
    with pytest.raises(error, match=message):
        build(experts_loop(8, 1024), tmp_path, "fp16", on_line=kill)
    assert left(tmp_path) == ["model.onnx"]


def living() -> set[psutil.Process]:
    """Children of this process; other tests have servers of their own."""
    return {p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}


def test_time_limit(tmp_path):
    before = living()
    with pytest.raises(NotEnough, match=r"within 0\.05 s"):
        build(linear("fp16"), tmp_path, "fp16", timeout_s=0.05)
    assert left(tmp_path) == ["model.onnx"]
    assert not living() - before


def test_interrupt_ends_the_child(tmp_path):
    def interrupt(line: str) -> None:
        # Once: lines that the child wrote before still come, and a second signal would interrupt the cleaning up.
        if not done:
            done.append(child())
            done[0].suspend()  # so that the parent is surely waiting for it
            os.kill(os.getpid(), signal.SIGINT)

    done: list[psutil.Process] = []
    before = living()
    with pytest.raises(KeyboardInterrupt):
        build(experts_loop(8, 1024), tmp_path, "fp16", on_line=interrupt)
    assert left(tmp_path) == ["model.onnx"]
    assert not living() - before


def test_callback_that_raises(tmp_path):
    def fail(line: str) -> None:
        raise LookupError("no screen")

    with pytest.raises(LookupError, match="no screen"):
        build(experts_loop(), tmp_path, "fp16", on_line=fail)


def test_failure_keeps_the_engine_that_was_there(tmp_path):
    (tmp_path / "m.engine").write_text("old")
    with pytest.raises(BadInput):
        build(linear("fp16"), tmp_path, "fp8")
    assert (tmp_path / "m.engine").read_text() == "old"


def test_experts_dequantised_one_by_one_then_stacked(tmp_path):
    count, rows, columns = 4, 200, 320
    weights = [tensor(f"w{e}", (rows, columns), ml_dtypes.float8_e4m3fn) for e in range(count)]
    scales = [numpy_helper.from_array(np.full((2, 3), 0.5 + e, np.float32), f"s{e}") for e in range(count)]
    nodes = [dequantize(f"w{e}", f"s{e}", f"d{e}", [128, 128]) for e in range(count)]
    nodes += [
        node("Concat", [f"d{e}" for e in range(count)], ["all"], axis=0),
        node("Constant", [], ["shape"], value_ints=[count, rows, columns]),
        node("Reshape", ["all", "shape"], ["stack"]),
        node("Gather", ["stack", "chosen"], ["some"], axis=0),
        node("MatMul", ["some", "x"], ["y"]),
    ]
    inputs = [value("x", TensorProto.BFLOAT16, ["B", columns, 1]), value("chosen", TensorProto.INT64, ["B"])]
    outputs = [value("y", TensorProto.BFLOAT16, ["B", rows, 1])]
    proto = model(nodes, inputs, outputs, [*weights, *scales], [dequantize_function()])
    assert build(proto, tmp_path, "fp8").layers["DEQUANTIZE"] == count


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_can_stay_in_host_memory(tmp_path, streamed):
    report = build(linear("fp16"), tmp_path, "fp16", targets=["sm86"], weight_streaming=streamed)
    assert ("it was built with WEIGHT_STREAMING" in dict(report.proofs)) == streamed
