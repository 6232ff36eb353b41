from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from v4export.engine import backend
from v4export.errors import BadInput, NotSupported


def test_unknown():
    with pytest.raises(BadInput, match="tensorrt_rtx"):
        backend.choose_backend("cudnn")


def test_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotSupported, match=r"v4export\[rtx\]"):
        backend.choose_backend("rtx")
    with pytest.raises(NotSupported, match=r"v4export\[gpu\]"):
        backend.choose_backend("tensorrt")


def test_standard_package_that_cannot_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "standard_works", lambda: False)
    with pytest.raises(NotSupported, match="--backend tensorrt_rtx"):
        backend.choose_backend("trt")
    assert backend.choose_backend() == "tensorrt_rtx"


def test_standard_package_is_preferred_where_it_works(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "standard_works", lambda: True)
    assert backend.choose_backend() == "tensorrt"


def test_versions():
    assert backend.package_version("pytest") == pytest.__version__
    assert backend.package_version("tensorrt-of-nobody") is None


def test_load():
    pytest.importorskip("tensorrt_rtx")
    loaded = backend.load_backend("tensorrt_rtx")
    assert loaded.name == "tensorrt_rtx" and loaded.names_capabilities
    assert hasattr(loaded.module, "OnnxParser") and loaded.version[0].isdigit()


@pytest.mark.slow
def test_nothing_is_imported_early():
    code = (
        "import sys, v4export.engine.build, v4export.engine.doctor; print([m for m in sys.modules if 'tensorrt' in m])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
