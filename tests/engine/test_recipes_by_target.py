"""Every recipe for every target: an engine, or a refusal with the table's reason; there is no third outcome."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.engine.options import EngineOptions
from v4export.engine.targets import TARGETS, Target
from v4export.errors import BadInput, NotSupported
from v4export.graphs.export import PORTABLE
from v4export.precision import PRECISIONS

TEXT = Path(__file__).parents[2] / "examples" / "tiny-v3" / "config.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a routed layer, whose widths are whole blocks of every format."""
    config = replace(
        presets.load("tiny-v3"), num_layers=2, moe_layers=(1,), num_experts=4, experts_per_token=2, num_groups=2,
        topk_groups=1, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32,
        qk_rope_head_dim=16, v_head_dim=16,
    )  # fmt: skip
    return synth(config, tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """A recipe's engine for all targets of TensorRT-RTX that have it, or None where none has; built once."""
    pytest.importorskip("tensorrt_rtx")

    @functools.cache
    def build(name: str):
        recipe = PRECISIONS[name]
        targets = [t.name for t in TARGETS if t.rtx and t.has(recipe)]
        if not targets:
            return None
        options = EngineOptions(targets=targets, backend="tensorrt_rtx", max_chunk=8)
        how = {"calibrate": TEXT} if recipe.inputs else {}
        out = tmp_path_factory.mktemp(name) / "out"
        built = api.build(checkpoint, out, precision=name, max_seq_len=64, verify=False, engine=options, **how)
        return built.engines[PORTABLE]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_an_engine_or_the_reason(checkpoint, engine, tmp_path, target: Target, name: str):
    recipe = PRECISIONS[name]
    if target.rtx and target.has(recipe):
        report = engine(name)
        assert target.name in report.targets and report.precision == name
        stored = {claim.rpartition(" ")[2] for claim, _ in report.proofs if "stored as" in claim}
        assert stored == set(recipe.stored)
        return
    if target.rtx:
        error, reason = BadInput, rf"{target.name} .*has no {name}(.|\n)*needs: .*it has: {', '.join(target.types)}"
    elif target.has(recipe):
        error, reason = NotSupported, "on a machine with that GPU"
    else:
        error, reason = BadInput, f"{target.name} .*has no {name}"
    # What a fallback would turn into another recipe is asked for with a target that the fallback does not help.
    options = EngineOptions(targets=[target.name], backend="tensorrt_rtx", plugins="none")
    fallback = api.recipe_for(checkpoint, name, options)
    if fallback[0] != name:
        assert fallback[1] and target.name in fallback[1]
        return
    how = {"calibrate": TEXT} if recipe.inputs else {}
    with pytest.raises(error, match=reason):
        api.build(checkpoint, tmp_path / "out", precision=name, engine=options, verify=False, **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_exceptions_are_built_and_read_back(checkpoint, tmp_path):
    """Formats differ between layers and modules; each is found again."""
    pytest.importorskip("tensorrt_rtx")
    keep = ["int8:layers.0.*", "fp32:*.o_proj", "mxfp8:lm_head", "nvfp4:layers.1.expert"]
    options = EngineOptions(targets=["sm120"], backend="tensorrt_rtx", max_chunk=8)
    out = tmp_path / "out"
    built = api.build(checkpoint, out, precision="bf16", keep=keep, max_seq_len=64, engine=options)
    formats = sum(map(Counter, built.graphs.lint.formats.values()), Counter())
    assert formats["nvfp4"] == 12 and formats["mxfp8"] == 1 and formats["int8"] > 4 and formats["bf16"] > 4
    stored = {claim.rpartition(" ")[2] for claim, _ in built.engines[PORTABLE].proofs if "stored as" in claim}
    assert stored == {"int8", "fp8", "fp4"}
    assert api.verify(out, decode=2).passed
