"""Multipliers that NVIDIA's Model Optimizer searches, against every multiplier there is."""

from __future__ import annotations

import json
import sys

import ml_dtypes
import numpy as np
import pytest

from v4export.api import build, export, verify
from v4export.checkpoint.narrow import narrow, outer_scale, widen
from v4export.errors import BadInput, NotSupported
from v4export.precision import Format, precision

OURS, SEARCHED = precision("nvfp4").expert, precision("nvfp4:modelopt-mse").expert


def matrix(rows: int = 32, width: int = 128) -> np.ndarray:
    rng = np.random.default_rng(3)
    w = (rng.standard_t(4, (rows, width)) * np.exp2(rng.integers(-8, 2, (rows, 1)))).astype(np.float32)
    w[0, :64] = 0
    return w


def errors(w: np.ndarray, format: Format) -> np.ndarray:
    """Squared error of each block."""
    wide = widen(narrow(w, format, outer_scale(float(np.abs(w).max()))), format)
    return np.square(wide - w).reshape(len(w), -1, 16).sum(axis=2)


@pytest.mark.slow
def test_errors_are_smaller_than_with_our_own_multipliers():
    w = matrix()
    assert errors(w, SEARCHED).sum() < 0.97 * errors(w, OURS).sum()


def test_nvfp4_has_the_best_of_all_multipliers():
    """By hand: each of the 126 numbers of E4M3 above zero, on every block."""
    w = matrix()
    outer = float(outer_scale(float(np.abs(w).max()))[0, 0])
    scales = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * outer
    blocks = w.reshape(len(w), -1, 1, 16)
    whole = scales[None, None, :, None]
    made = np.clip(blocks / whole, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * whole
    least = np.square(made - blocks).sum(axis=3).min(axis=2)
    np.testing.assert_allclose(errors(w, SEARCHED), least, rtol=1e-5, atol=1e-12)


def test_windows_do_not_show():
    w, format = matrix(64), SEARCHED
    outer = outer_scale(float(np.abs(w).max()))
    whole, halves = narrow(w, format, outer), [narrow(part, format, outer) for part in (w[:32], w[32:])]
    np.testing.assert_array_equal(whole.numbers, np.concatenate([one.numbers for one in halves]))


@pytest.mark.parametrize("name", ["int4:modelopt-mse", "mxfp4:modelopt-mse", "nvfp4:awq", "native:modelopt-mse"])
def test_what_it_does_not_search_is_refused(name):
    with pytest.raises(BadInput, match=r"is no recipe|unknown precision"):
        precision(name)


@pytest.mark.slow
def test_a_bundle_says_who_chose_its_multipliers_and_is_verified_so(tmp_path, tiny_checkpoint):
    built = build(tiny_checkpoint, tmp_path / "out", precision="nvfp4:modelopt-mse", engine=None)
    assert built.verification is not None and built.verification.passed
    manifest = tmp_path / "out" / "v4export.json"
    assert json.loads(manifest.read_text())["precision"] == "nvfp4:modelopt-mse"
    manifest.write_text(manifest.read_text().replace(":modelopt-mse", ""))
    assert not verify(tmp_path / "out").passed


def test_without_the_package_nothing_is_begun(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(NotSupported, match="nvidia-modelopt, which is not installed"):
        export(tiny_checkpoint, tmp_path / "out", precision="nvfp4:modelopt-mse")
    assert not (tmp_path / "out").exists()
