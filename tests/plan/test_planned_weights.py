"""Bytes that are foreseen are those that an export writes and points at."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4export import api, presets
from v4export.checkpoint.activation_scales import wanted_shapes
from v4export.checkpoint.audit import audit, in_graph
from v4export.checkpoint.imagined import imagined
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.names import expected
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.graphs.weights import decide
from v4export.plan.weights import weight_bytes
from v4export.precision import MATRIX_ROLES, PRECISIONS, module_path, precision

TINY = [name for name in presets.names() if name.startswith("tiny")]


def kept(config: ModelConfig, recipe: str) -> list[str]:
    """Exceptions for matrices whose rows are no whole number of a recipe's blocks."""
    wanted = precision(recipe, config)
    misfits = {
        module_path(name)
        for name, one in expected(config).items()
        if one.role in MATRIX_ROLES and not wanted.format_of(name, one.role).fits(one.shape[-1])
    }
    return [f"bf16:{'|'.join(sorted(misfits))}"] if misfits else []


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    return {name: synth(presets.load(name), folder / name) for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_what_is_imagined_is_what_is_written(checkpoints, name):
    checkpoint = Checkpoint.open(checkpoints[name])
    found, there = imagined(checkpoint.config), audit(checkpoint, scan_values=False).weights
    assert list(found) == list(there)
    for one, other in zip(found.values(), there.values(), strict=True):
        assert (one.shape, one.role, one.data.dtype, one.data.shape) == (
            other.shape, other.role, other.data.dtype, other.data.shape,
        )  # fmt: skip
        assert (one.scale and (one.scale.dtype, one.scale.shape)) == (
            other.scale and (other.scale.dtype, other.scale.shape)
        )


@pytest.mark.parametrize("recipe", PRECISIONS)
@pytest.mark.parametrize("name", TINY)
def test_every_byte_is_foreseen(checkpoints, name, recipe):
    checkpoint = Checkpoint.open(checkpoints[name])
    config = checkpoint.config
    wanted = precision(recipe, config, kept(config, recipe))
    weights = audit(checkpoint, scan_values=False).weights
    # What an export goes by; the whole of it is below.
    pointed, converted = zip(*(decide(w, wanted) for w in in_graph(weights, config).values()), strict=True)
    found = weight_bytes(weights, config, wanted)
    scales = sum(4 * (shape[0] if shape else 1) for shape in wanted_shapes(config, wanted).values())
    assert found.pointed_bytes == sum(t.nbytes for some in pointed for _, t in some)
    assert found.written_bytes == sum(c.nbytes for some in converted for c in some) + scales
    assert weight_bytes(imagined(config), config, wanted).total == found.total
    assert found.shard_bytes == sum(file.stat().st_size for file in checkpoint.files) or found.pointed_bytes == 0
    # Multipliers of FP4 that are exponents stay so, a byte each in place of two.
    formats = [wanted.format_of(n, w.role).nbytes(*w.shape) for n, w in weights.items() if w.role == "expert"]
    as_stored = [w.scale.nbytes for w in weights.values() if w.packed and recipe == "mxfp4"]
    experts = sum(found.each[n] for n, w in weights.items() if w.role == "expert")
    assert experts == sum(formats) - sum(as_stored)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tiny-v3", "int8"),
        ("tiny-v3.1", "mxfp4"),
        *(
            pytest.param(name, recipe, marks=pytest.mark.slow)
            for name, recipe in (
                ("tiny-v3.2", "fp8"),
                ("tiny-v4", "nvfp4"),
                ("tiny-v4-fp4", "int4"),
                ("tiny-v4.1", "fp8"),
                ("tiny-v4x", "bf16"),
            )
        ),
    ],
)
def test_an_export_writes_and_points_at_what_is_foreseen(checkpoints, tmp_path, name, recipe):
    keep = kept(Checkpoint.open(checkpoints[name]).config, recipe)
    made = api.export(checkpoints[name], tmp_path / "out", precision=recipe, keep=keep).graphs
    found = api.plan(checkpoints[name], precision=recipe, keep=keep, no_engine=True, no_verify=True).bytes
    for what in ("pointed_bytes", "written_bytes", "cpu_bytes", "beside_bytes"):
        assert found[what] == getattr(made, what), what
    files = [(tmp_path / "out" / "weights").glob(f"{stem}-*.safetensors") for stem in ("converted", "cpu")]
    written, cpu = (sum(file.stat().st_size for file in some) for some in files)
    assert 0 <= written - found["written_bytes"] < 1 << 16 and 0 <= cpu - found["cpu_bytes"] < 1 << 16
