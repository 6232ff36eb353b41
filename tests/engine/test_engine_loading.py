"""Engines that TensorRT-RTX has built, loaded by it: without a driver it refuses, and says why."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from engine_graphs import linear, save

from v4export.engine.backend import cuda_devices
from v4export.engine.build import build_engine
from v4export.errors import NotSupported
from v4export.precision import PRECISIONS
from v4export.runtime.on_device.device import Device
from v4export.runtime.on_device.loaded import Runtime


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has what is to be missing")
def test_a_machine_without_a_driver_is_told_what_the_engine_is_for(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    graph = save(linear("fp16"), tmp_path, external=True)
    how = {"precision": PRECISIONS["fp16"], "targets": ["sm86"], "backend": "tensorrt_rtx", "max_batch": 3}
    report = build_engine(graph, tmp_path / "model.engine", **how)
    assert (report.plugins, report.max_batch) == ("none", 3)
    engines = {"model.onnx": {**asdict(report), "path": "model.engine"}}
    with pytest.raises(NotSupported, match=r"cannot load model\.engine here\n  built for sm86; here is no GPU; .*CUDA"):
        Runtime(trt, Device("cpu"), tmp_path, engines).load("model.onnx")
