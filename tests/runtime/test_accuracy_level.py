"""Integer matrices through onnxruntime's kernels: exact unless asked otherwise, and the same without them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from traced import export_bundle

from v4export.cli import cli
from v4export.errors import BadInput
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(2).integers(0, 300, (1, 24))


@pytest.fixture(scope="module", params=["int4", "int8"])
def bundles(request, trained_checkpoint, tmp_path_factory) -> tuple[Bundle, Bundle]:
    """The same with and without weights of its own for a CPU."""
    folder = tmp_path_factory.mktemp(request.param)
    return tuple(
        export_bundle(trained_checkpoint, folder / str(own), request.param, cpu_weights=own) for own in (True, False)
    )


def executor(bundle: Bundle, **options) -> OnnxExecutor:
    return OnnxExecutor(bundle.folder, bundle.config, bundle.precision, max_seq_len=64, threads=1, **options)


def logits(bundle: Bundle, ids: np.ndarray = IDS, lengths: np.ndarray | None = None, **options) -> np.ndarray:
    """Of every token, after a prompt's chunk and some steps of one token."""
    runner = executor(bundle, **options)
    state, out = runner.new_state(len(ids)), []
    for first, end in ((0, ids.shape[1] - 3), *((t, t + 1) for t in range(ids.shape[1] - 3, ids.shape[1]))):
        at = np.tile(np.arange(end - first), (len(ids), 1))
        lens = None if lengths is None or first else lengths
        out.append(runner.step(ids[:, first:end], state, logits_at_BQ=at, lengths_B=lens))
    return np.concatenate(out, 1)


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Most tokens' difference; a router's near tie may go either way."""
    return float(np.median(np.abs(got - wanted).max(-1)) / np.abs(wanted).max())


@pytest.mark.parametrize("prepack", [True, False])
def test_exact_unless_asked_otherwise(bundles, prepack, monkeypatch):
    own, without = bundles
    assert not list(Path(without.folder, "weights").glob("cpu-*")) and list(Path(own.folder, "weights").glob("cpu-*"))
    assert without.manifest["graphs"]["cpu_bytes"] == 0 < own.manifest["graphs"]["cpu_bytes"]
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "int8")  # a user's own setting neither matters nor is lost
    assert apart(logits(own, prepack=prepack), logits(without, prepack=prepack)) < 1e-2
    assert os.environ["ORT_QMOE_CPU_QNBIT_GEMM"] == "int8"


def test_level_four_is_faster_arithmetic(bundles, monkeypatch):
    monkeypatch.delenv("ORT_QMOE_CPU_QNBIT_GEMM", raising=False)
    own, without = bundles
    exact, rounded = logits(own), logits(own, accuracy_level=4)
    assert "ORT_QMOE_CPU_QNBIT_GEMM" not in os.environ
    assert 1e-4 < apart(rounded, exact) < 0.1
    assert apart(logits(without, accuracy_level=4), logits(without)) == 0


def test_sequences_of_any_lengths(bundles):
    ids = np.random.default_rng(3).integers(0, 300, (3, 14))
    lengths = np.array([11, 2, 7])
    got, wanted = (logits(one, ids, lengths) for one in bundles)
    last = np.arange(3), lengths - 1
    assert apart(got[last], wanted[last]) < 1e-2
    assert apart(got[:, -3:], wanted[:, -3:]) < 1e-2


def test_another_level(bundles):
    with pytest.raises(BadInput, match="unknown accuracy level 2"):
        executor(bundles[0], accuracy_level=2)


def test_the_command(bundles):
    command = ["run", str(bundles[0].folder), "--prompt", "The", "-n", "4", "--accuracy-level", "4", "--json"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
