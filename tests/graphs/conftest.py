"""Traced parts and stamped graphs for the tests of this folder; a trace takes seconds and is made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from v4export import presets
from v4export.checkpoint import names
from v4export.checkpoint.formats import grid
from v4export.checkpoint.names import SCALE
from v4export.config import ModelConfig
from v4export.graphs import export
from v4export.graphs.export import STAMPS
from v4export.graphs.shards import Placed, numpy_dtype
from v4export.graphs.stamp import stamp
from v4export.graphs.trace import Part
from v4export.graphs.weights import SCALE_2
from v4export.precision import PRECISIONS, Precision

Trace = Callable[..., tuple[ModelConfig, Precision, Mapping[str, Part]]]


@pytest.fixture(scope="session")
def trace() -> Trace:
    """From a preset, a precision and changed fields: the config, the precision and its traced parts."""
    made: dict[Any, Any] = {}

    def make(preset: str = "tiny-v3", precision: str = "fp32", **changes: Any):
        key = (preset, precision, *sorted(changes.items()))
        if key not in made:
            config = replace(presets.load(preset), **changes)
            made[key] = config, PRECISIONS[precision], export.traced(config, PRECISIONS[precision])
        return made[key]

    return make


def place_nowhere(config: ModelConfig, precision: Precision) -> dict[str, Placed]:
    """Every weight one behind the other in a file that is never read."""
    placed, at = {}, 0
    for one in names.expected(config).values():
        format = precision.format_of(one.name, one.role)
        entries = [(one.name, format.dtype, one.shape)]
        if format.block:
            block = format.block[0], format.columns(one.shape[-1])
            entries.append((one.name + SCALE, format.scale, grid(one.shape, block)))
        if format.outer:
            entries.append((one.name + SCALE_2, "float32", (1, 1)))
        for name, kind, shape in entries:
            count = math.prod(shape)
            size = count // 2 if kind in ("float4_e2m1fn", "int4") else count * numpy_dtype(kind).itemsize
            placed[name] = Placed(name, "weights/model.safetensors", at, size, kind, shape)
            at += size
    return placed


@pytest.fixture(scope="session")
def stamped(trace: Trace) -> Callable[..., tuple[ModelConfig, ir.Model, Mapping[str, Part]]]:
    """As ``trace``, then stamped: the config, a graph of one's own, and the parts.

    ``wider`` changes the config after tracing.
    """

    def make(*args: Any, wider: Mapping[str, Any] | None = None, **changes: Any):
        config, precision, parts = trace(*args, **changes)
        config = replace(config, **(wider or {}))
        return config, stamp(config, precision, parts, place_nowhere(config, precision), Path("nowhere")), parts

    return make


@pytest.fixture(scope="session")
def all_stamped(trace: Trace) -> Callable[..., tuple[ModelConfig, dict[str, ir.Model], Mapping[str, Part]]]:
    """As ``stamped``, with every graph of the model by its name."""

    def make(*args: Any, **changes: Any):
        config, precision, parts = trace(*args, **changes)
        made = (config, precision, parts, place_nowhere(config, precision), Path("nowhere"))
        return config, {name: stamping(*made) for name, (part, stamping) in STAMPS.items() if part in parts}, parts

    return make
