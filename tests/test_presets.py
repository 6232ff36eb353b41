from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from v4export import presets
from v4export.checkpoint.count import parameter_counts
from v4export.config import CSA, HCA, WINDOW, Fp8Blocks, Indexer, Reasoning
from v4export.config.readers import read_config
from v4export.errors import BadInput

PUBLISHED = ["deepseek-v2-lite", "deepseek-v3", "deepseek-v3.1", "kimi-k2"]
V41 = ["deepseek-v4.1-flash"]
OWN = ["v4-1t", "v4-lite"]
V4 = [f"deepseek-v4-{name}" for name in ("flash", "flash-0731", "flash-base", "pro", "pro-0813", "pro-base")]
TINY = [
    "tiny-kimi-k2",
    "tiny-v2-lite",
    "tiny-v3",
    "tiny-v3.1",
    "tiny-v3.2",
    "tiny-v4",
    "tiny-v4-fp4",
    "tiny-v4.1",
]
LARGE = {
    "tiny-kimi-k2": "kimi-k2",
    "tiny-v4": "deepseek-v4-flash",
    "tiny-v4-fp4": "deepseek-v4-flash",
    "tiny-v4.1": "deepseek-v4.1-flash",
}


def test_names():
    assert {*PUBLISHED, *TINY, *V4, *V41, *OWN, "tiny-v4x", "deepseek-v3.2"} == {*presets.names()}
    assert presets.names() == sorted(presets.names())
    assert all(presets.load(name).num_layers for name in presets.names())


def test_the_example_that_thinks_is_a_preset():
    example = Path(__file__).parents[1] / "examples" / "tiny-v4x"
    assert read_config(example) == presets.load("tiny-v4x")


def test_unknown_name():
    with pytest.raises(BadInput, match=r"Did you mean .*deepseek-v3"):
        presets.load("deepsek-v3")
    with pytest.raises(BadInput, match=r"'\.\./x'"):
        presets.path("../x")


def test_published_numbers():
    lite, v3, v31, k2 = map(presets.load, PUBLISHED)
    assert (lite.q_lora_rank, lite.scoring, lite.topk_method) == (None, "softmax", "greedy")
    assert lite.softmax_scale == pytest.approx(0.114721, abs=1e-6)
    assert v3.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert (v3.fp8, v31.fp8, lite.fp8) == (Fp8Blocks(), Fp8Blocks(power_of_two=True), None)
    assert (v3.num_groups, v3.topk_groups, len(v3.moe_layers), v3.num_mtp_layers) == (8, 4, 58, 1)
    assert (k2.num_heads, k2.num_experts, k2.routed_scaling_factor, k2.rope_theta) == (64, 384, 2.827, 50000)
    assert k2.yarn and (k2.yarn.beta_fast, k2.yarn.beta_slow) == (1, 1)


def test_v32_is_v31_with_an_indexer():
    v32, v31 = presets.load("deepseek-v3.2"), presets.load("deepseek-v3.1")
    assert v32 == replace(v31, family="deepseek_v32", indexer=Indexer(64, 128, 2048))


def test_own_designs_think():
    assert [presets.load(name).reasoning for name in OWN] == [Reasoning(layers=2, steps=8)] * 2


def test_v4_releases():
    flash, flash_0731, flash_base, pro, pro_0813, pro_base = map(presets.load, V4)
    assert [flash.compressed.layers.count(kind) for kind in (WINDOW, CSA, HCA)] == [2, 21, 20]
    assert [pro.compressed.layers.count(kind) for kind in (WINDOW, CSA, HCA)] == [0, 30, 31]
    assert (flash.kind(0), flash.kind(2), flash.kind(3), flash.kind(42)) == ("window hash", "csa hash", "hca", "csa")
    assert flash.softmax_scale == pytest.approx(0.0441942, abs=1e-7)
    # Later releases change what drafts, and base models how experts are stored.
    assert (flash_0731, pro_0813) == (flash, pro)
    assert flash_base == replace(flash, fp4_experts=False) != flash
    assert pro_base == replace(pro, fp4_experts=False) != pro
    assert flash.fp8 == Fp8Blocks(power_of_two=True)
    for name in V4:
        raw = json.loads(presets.path(name).read_text())
        stages = 3 if name[-4:].isdigit() else 1
        assert len(raw["compress_ratios"]) == raw["num_hidden_layers"] + stages


@pytest.mark.parametrize("name", ["tiny-v4", "tiny-v4-fp4"])
def test_tiny_v4_has_every_kind_of_layer(name):
    config = presets.load(name)
    assert set(config.kinds) == {"window hash", "csa hash", "csa", "hca"}
    # Of few heads, all may score 0 behind the ReLU, and which entries are chosen would be open.
    assert config.indexer.num_heads >= 32
    assert config.fp4_experts == (name == "tiny-v4-fp4")


@pytest.mark.parametrize("name", TINY)
def test_tiny_ones_are_small_and_odd(name):
    config = presets.load(name)
    assert parameter_counts(config).total < 2_500_000
    assert config.hidden_size % 128
    assert config.yarn
    assert 0 < len(config.moe_layers) < config.num_layers or config.compressed
    # A family's options are those of the model it is the small form of.
    large = presets.load(LARGE.get(name, name.replace("tiny-v", "deepseek-v")))
    for option in ("family", "scoring", "topk_method", "norm_topk_prob", "routed_scaling_factor", "rope_theta"):
        assert getattr(config, option) == getattr(large, option)
    assert (config.q_lora_rank is None) == (large.q_lora_rank is None)
    assert (config.num_groups > 1) == (large.num_groups > 1)
    assert (config.indexer is None) == (large.indexer is None)
