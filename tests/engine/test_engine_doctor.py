from __future__ import annotations

import time

from v4export.engine import doctor


def test_findings():
    start = time.monotonic()
    found = {finding.component: finding for finding in doctor.diagnose()}
    assert time.monotonic() - start < 3
    assert {"python", "torch", "onnxruntime", "tensorrt_rtx", "tensorrt", "polygraphy", "CUDA device"} <= found.keys()
    assert {"C++ compiler", "cores", "memory", "disk"} <= found.keys()
    for finding in found.values():
        assert finding.state in ("ok", "missing", "limited") and finding.does
        assert finding.state == "ok" or finding.fix, finding
    assert found["python"].state == "ok"


def test_engine_stage_lists_targets_by_precision(monkeypatch):
    monkeypatch.setattr(doctor, "package_version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "standard_works", lambda: False)
    stage = {finding.component: finding for finding in doctor.diagnose()}["stage: engine"]
    assert "fp8 mxfp8 fp8-w8a8: sm89 sm120 sm121; mxfp4 nvfp4: sm120 sm121" in stage.does


def test_a_bare_machine(monkeypatch):
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    monkeypatch.setattr(doctor, "standard_works", lambda: False)
    monkeypatch.setattr(doctor, "cuda_devices", lambda: ())
    found = {finding.component: finding for finding in doctor.diagnose()}
    assert {found[f"stage: {name}"].state for name in ("export", "verify", "engine", "run engines")} == {"missing"}
