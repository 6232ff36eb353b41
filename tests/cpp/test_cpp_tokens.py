"""The C++ runner says what ``v4export run`` says, for every family, precision and kind of state."""

from __future__ import annotations

from pathlib import Path

import pytest
from cpp_runner import check_equal, compiled, package
from small_models import small
from traced import export_bundle

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.package.bundle import Bundle

pytestmark = pytest.mark.slow

TINY = [name for name in presets.names() if name.startswith("tiny-")]
#: The longest takes two chunks of a prompt, fills every ring several times, and completes entries of 128 tokens.
PROMPTS = ("a", "def add(a, b):\n    return a + b\n", "The quick brown fox. " * 29)


@pytest.fixture(scope="module")
def program(tiny_bundle, tmp_path_factory) -> Path:
    """One program for all bundles, which are described to it when it runs."""
    return compiled(package(tiny_bundle("fp32")), tmp_path_factory.mktemp("cpp") / "build") / "v4export_run"


def exported(tmp_path: Path, preset: str, precision: str, **options: object) -> Bundle:
    checkpoint = synth(small(preset), tmp_path / "hub")
    return api.export(checkpoint, tmp_path / "out", precision=precision, max_seq_len=1024, **options).bundle


def test_tokens_of_one_model(program, tiny_bundle):
    assert len(check_equal(program, tiny_bundle("fp32"), PROMPTS, 24)) == len(PROMPTS)


@pytest.mark.parametrize("preset", TINY)
def test_tokens_of_every_preset(program, tmp_path, preset):
    checkpoint = synth(presets.load(preset), tmp_path / "hub")
    bundle = api.export(checkpoint, tmp_path / "out", precision="fp32", max_seq_len=1024).bundle
    assert len(check_equal(program, bundle, PROMPTS, 24)) == len(PROMPTS)


@pytest.mark.parametrize(
    ("preset", "precision", "options"),
    [
        ("tiny-v3", "bf16", {}), ("tiny-v3", "fp16", {}), ("tiny-v3", "fp8", {}),
        ("tiny-v3", "bf16", {"state": "fp8"}), ("tiny-v4", "bf16", {"state": "fp8"}),
        ("tiny-v4.1", "bf16", {}), ("tiny-v4.1", "fp32", {"engram_inside": True}),
    ],
)  # fmt: skip
def test_tokens_of_precisions(program, tmp_path, preset, precision, options):
    bundle = exported(tmp_path, preset, precision, **options)
    check_equal(program, bundle, PROMPTS, 24)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_tokens_of_integers(program, trained_checkpoint, tmp_path, precision, monkeypatch):
    """Whose graph is not the bundle's own, since Python changes it when it makes a session."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "int8")  # a user's own setting does not matter
    bundle = export_bundle(trained_checkpoint, tmp_path / "out", precision)
    assert (package(bundle) / "model" / "model.cpu.onnx").is_file()
    assert len(check_equal(program, bundle, PROMPTS[:2], 24)) == 2
