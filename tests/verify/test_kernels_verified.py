"""verify --kernels: the portable graph by this project's kernels for a CPU, in every family and format."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import count_allocations
import onnx
import onnx_ir as ir
import pytest

from v4export import api
from v4export.graphs import kept
from v4export.graphs.lower import lower_for_cpu, lower_for_kernels
from v4export.graphs.passes.cpu_kernels import KERNELS
from v4export.package.bundle import Bundle
from v4export.plugins.cpu import library
from v4export.plugins.kernels.emulate import compiler
from v4export.runtime import sessions

pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]

#: A preset and a precision -> operators that have kernels then, besides those of every model.
WHAT = {
    ("tiny-v2-lite", "fp16"): {"MoeExperts", "LatentAttention"},
    ("tiny-v3.2", "bf16"): {"MoeExperts", "SparseLatentAttention", "IndexSelect", "Round"},
    ("tiny-v4", "fp32"): {
        "HashRoute", "MoeExperts", "WindowAttention", "CompressedAttention", "SparseAttention", "IndexSelect",
        "HyperConnection", "HyperMix", "CompressTokens", "RmsNorm",
    },
    ("tiny-v4.1", "bf16"): {
        "MoeExperts", "WindowAttention", "SparseAttention", "IndexSelect", "CandidateSelect", "IndexReselect",
        "HyperCoefficients", "HyperMix", "CompressTokens", "Round",
    },
    ("tiny-v4x", "fp32"): {"MoeExperts", "LatentAttention", "HeadLinear"},
}  # fmt: skip
#: In every model, by whether the graph computes in 16 bits.
ALL = (
    {"Linear", "MoeRoute", "Rotate", "SwiGlu"},
    {"Linear", "HeadLinear", "MoeRoute", "RmsNorm", "Rotate", "Sum", "SwiGlu"},
)


@pytest.mark.parametrize(("preset", "precision"), WHAT)
def test_random_models(random_bundle: Callable[[str, str], Bundle], preset: str, precision: str) -> None:
    bundle = random_bundle(preset, precision)
    assert kernels_of(bundle) == WHAT[preset, precision] | ALL[precision != "fp32"]
    check(bundle)


@pytest.mark.parametrize("precision", ["fp32", "fp8", "mxfp8", "mxfp4", "nvfp4"])
def test_formats(exported: Callable[[str], Bundle], precision: str) -> None:
    bundle = exported(precision)
    assert kernels_of(bundle) == {"HeadLinear", "LatentAttention", "MoeExperts"} | ALL[precision != "fp32"]
    check(bundle)


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("counter") / "allocations.so"
    source = Path(__file__).with_name("allocations.cpp")
    subprocess.run([str(compiler()), "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
    return made


@pytest.mark.parametrize(("preset", "precision"), [*WHAT, ("trained", "mxfp4")])
def test_no_step_allocates(
    counter: Path,
    exported: Callable[[str], Bundle],
    random_bundle: Callable[[str, str], Bundle],
    preset: str,
    precision: str,
) -> None:
    """That is no longer than one before it."""
    bundle = exported(precision) if preset == "trained" else random_bundle(preset, precision)
    done = subprocess.run(
        [sys.executable, count_allocations.__file__, str(bundle.folder)],
        env={**os.environ, "LD_PRELOAD": str(counter), "COUNTED": str(library())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, again = (int(line) for line in done.stdout.split())
    assert first > 0
    assert again == 0


def test_integers_are_left_to_onnxruntime(exported: Callable[[str], Bundle]) -> None:
    """int4 experts have no kernel; what is bfloat16 beside them has."""
    assert "MoeExperts" not in kernels_of(exported("int4"))
    check(exported("int4"))


def test_a_kernel_that_computes_something_else_is_found(
    exported: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path) -> onnx.ModelProto:
        model = lower_for_kernels(path)
        node = next(node for node in model.graph.all_nodes() if node.op_type == "LatentAttention")
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.01 * node.attributes["scale"].as_float())
        return ir.to_proto(model)

    monkeypatch.setattr(sessions, "graph_for_kernels", wrong)
    found = api.verify(exported("fp32").folder, kernels=True, decode=2)
    assert not found.passed
    assert api.verify(exported("fp32").folder, decode=2).passed


def test_what_layers_select_has_no_size_in_common(random_bundle: Callable[[str, str], Bundle]) -> None:
    """Indexers of entries of 2 tokens and of 1 select different numbers, which would be one size by one name."""
    path = random_bundle("tiny-v4.1", "bf16").folder / "model.onnx"
    for lower in (lower_for_cpu, lower_for_kernels):
        named = {value.name: value.shape for node in lower(path).graph for value in node.outputs if value.shape}
        selected = [shape[1] for name, shape in named.items() if str(name).startswith(("selected.", "candidates."))]
        assert len(selected) == 4
        assert all(isinstance(size, ir.SymbolicDim) and size.value is None for size in selected)


def test_what_kernels_take_is_made_once(
    exported: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where the graph is another, or what makes it."""
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def lower(path: Path) -> ir.Model:
        made.append(path)
        return lower_for_kernels(path)

    monkeypatch.setattr(kept, "lower_for_kernels", lower)
    path = exported("fp32").folder / "model.onnx"
    first = kept.graph_for_kernels(path)
    assert kept.graph_for_kernels(path) == first == ir.to_proto(lower_for_kernels(path))
    assert len(made) == 1
    other = tmp_path / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.doc_string = "another"
    onnx.save(model, other)
    kept.graph_for_kernels(other)
    assert len(made) == 2
    monkeypatch.setattr(kept, "_maker", lambda: b"another")
    kept.graph_for_kernels(path)
    assert len(made) == 3


def test_a_cache_without_room_costs_no_run(
    exported: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path))
    path = exported("fp32").folder / "model.onnx"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        found = kept.graph_for_kernels(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert found == ir.to_proto(lower_for_kernels(path))
    assert not [*(tmp_path / "kernels").iterdir()]


def kernels_of(bundle: Bundle) -> set[str]:
    model = lower_for_kernels(bundle.folder / "model.onnx")
    assert not any(node.op_type in KERNELS and node.domain != "v4" for node in model.graph.all_nodes())
    return {node.op_type for node in model.graph.all_nodes() if node.domain == "v4"}


def check(bundle: Bundle) -> None:
    api.verify(bundle.folder, kernels=True, decode=4).check()
