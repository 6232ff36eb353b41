"""What is proved of graphs that round inputs, on small traced graphs of every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_models import small
from traced import export_bundle

from v4export import api
from v4export.checkpoint.activation_scales import ActivationScales, all_scales
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.engine.options import EngineOptions
from v4export.errors import NotSupported
from v4export.graphs.export import for_cpu, graphs_in
from v4export.graphs.lower import lower_for_engine
from v4export.graphs.roundings import check_roundings, rounding_faults
from v4export.package.bundle import Bundle
from v4export.precision import precision

FAMILIES = (
    "tiny-v3",
    *(pytest.param(p, marks=pytest.mark.slow) for p in ("tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x")),
)


def exported(folder: Path, preset: str, **options) -> Bundle:
    """A bundle of random weights, which rounds inputs by scales that are made up."""
    synth(small(preset), folder / "model")
    checkpoint, rng = Checkpoint.open(folder / "model"), np.random.default_rng(0)
    shapes = all_scales(checkpoint.config)
    values = {n: np.exp(rng.uniform(-5, -4, shape)).astype(np.float32) for n, shape in shapes.items()}
    ActivationScales(values, checkpoint.header_hash).write(folder / "scales.safetensors")
    return export_bundle(
        folder / "model", folder / "out", "fp8-w8a8", calibrate=folder / "scales.safetensors", **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", FAMILIES)
def test_every_graph_rounds_what_its_recipe_says(tmp_path, preset):
    bundle = exported(tmp_path, preset)
    read: set[str] = set()
    for name in graphs_in(bundle.folder):
        portable, lowered = (ir.load(bundle.folder / file) for file in (name, for_cpu(name)))
        assert rounding_faults(portable, lowered, bundle.config, bundle.precision) == ()
        scales = [n for n in portable.graph.initializers if n.endswith(("input_scale", "middle_scale"))]
        experts = sum(n.endswith("middle_scale") for n in scales)
        steps = bundle.config.reasoning.steps if bundle.config.reasoning and name == "think.onnx" else 1
        assert check_roundings(portable, bundle.config, bundle.precision) == steps * (len(scales) - experts)
        read |= {*scales}
        # The same graph does not do what other recipes say.
        if scales:
            with pytest.raises(NotSupported, match="does not round inputs as its recipe says"):
                check_roundings(portable, bundle.config, precision("fp8", bundle.config))
    assert read == all_scales(bundle.config).keys()


@pytest.mark.slow
def test_what_is_kept_wider_rounds_nothing(tmp_path):
    keep = ["bf16:layers.0.*", "bf16:layers.1.mlp.experts", "fp8:*.q_b_proj"]
    bundle = exported(tmp_path, "tiny-v3", keep=keep)
    portable, lowered = (ir.load(bundle.folder / file) for file in ("model.onnx", "model.cpu.onnx"))
    assert rounding_faults(portable, lowered, bundle.config, bundle.precision) == ()
    scales = {n for n in portable.graph.initializers if n.endswith("_scale")}
    assert not [n for n in scales if n.startswith(("model.layers.0.", "model.layers.1.mlp.experts."))]
    assert "model.layers.1.self_attn.q_b_proj.input_scale" in scales
    assert "model.layers.2.mlp.experts.middle_scale" in scales


@pytest.mark.slow
def test_tensorrt_builds_it(tmp_path):
    """It takes one layer of a name that quantises, and a constant of another body for one of the same name."""
    pytest.importorskip("tensorrt_rtx")
    bundle = exported(tmp_path, "tiny-v3")
    model, _ = lower_for_engine(bundle.folder / "model.onnx", lambda _: False, 0, dict)
    assert model is not None
    quantise = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    in_functions = {v.name for f in model.functions.values() for n in f for v in n.outputs}
    assert len({n.name for n in quantise}) == len(quantise) > len(bundle.config.moe_layers) * 2
    assert not {n.inputs[1].name for n in quantise} & in_functions
    assert not [n for f in model.functions.values() for n in f if n.op_type == "QuantizeLinear"]
    (report,) = api.engine(bundle.folder, EngineOptions(targets=("sm89",), max_chunk=16)).values()
    assert report.bytes > 1e5 and any("rounded to fp8" in claim for claim, _ in report.proofs)
