"""Bytes that a decoded token reads: of each way to hold weights, and of cached rows, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from v4export import presets
from v4export.checkpoint.count import parameter_counts
from v4export.config.chosen import Chosen
from v4export.graphs.repacked import BITS
from v4export.plan.reads import are_repacked, reads
from v4export.precision import precision

FAMILIES = ("tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1", "tiny-v4x")


def of(preset: str, recipe: str, context: int = 0, **options):
    config = presets.load(preset)
    if recipe in BITS:  # whose blocks have 32 columns
        config = replace(config, q_lora_rank=64, intermediate_size=224, moe_intermediate_size=64)
    return config, reads(config, precision(recipe, config), context, **{"widened": True, "repacked": False, **options})


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_plain_weights_are_read_in_float32(preset, recipe):
    """Whatever is at work for a token, and what is no parameter to transformers: biases of routers, hash tables."""
    config, found = of(preset, recipe)
    active = 4 * parameter_counts(config).active
    assert active <= found.weights <= 1.02 * active and found.state == 0


def test_a_device_reads_what_is_stored():
    found = of("tiny-v3", "bf16", widened=False)[1]
    plain = of("tiny-v3", "fp32", widened=False)[1]
    assert plain.weights == of("tiny-v3", "fp32")[1].weights
    # Routers' biases stay float32.
    assert plain.weights / 2 <= found.weights <= 1.01 * plain.weights / 2


def test_experts_in_narrow_formats_are_read_as_stored():
    config, narrow = of("tiny-v3", "fp8")
    plain = of("tiny-v3", "fp32")[1]
    active = config.experts_per_token * config.expert_parameters * len(config.moe_layers)
    saved = plain.weights - narrow.weights
    assert 0.9 * 3 * active < saved < 3 * active


def test_integers_as_kernels_read_them():
    found, without, plain = (
        of("tiny-v3", recipe, repacked=repacked)[1].weights
        for recipe, repacked in (("int4", True), ("int4", False), ("fp32", False))
    )
    # Experts have 4 bits and a float32 for 32 numbers; other matrices eight, or as many as before.
    assert plain * 5 / 32 < found < without < plain
    assert are_repacked({"weights/cpu-00001.safetensors": {}}) and not are_repacked({"weights/converted-00001": {}})


@pytest.mark.parametrize("preset", ["deepseek-v3", "tiny-v4"])
def test_what_drafts_is_a_graph_of_its_own(preset):
    plain = presets.load(preset)
    config = Chosen(draft=True).of(plain)
    assert config.drafts
    found = [reads(one, precision("bf16", one), 64, widened=False, repacked=False) for one in (plain, config)]
    assert found[0] == found[1]


def test_cached_rows_by_hand():
    config, found = of("tiny-v3", "fp32", 100)
    assert found.state == 100 * config.latent_dim * 4 * config.num_layers
    assert of("tiny-v3", "bf16", 100)[1].state == found.state / 2
    v4, near = of("tiny-v4", "fp32", 1000)
    far = of("tiny-v4", "fp32", 2000)[1].state
    assert v4.compressed is not None and near.state < far < 2 * near.state
