from __future__ import annotations

from dataclasses import replace

import pytest

from v4export import presets
from v4export.checkpoint.count import parameter_counts


# Totals are those of transformers' classes instantiated without memory.
@pytest.mark.parametrize(
    ("name", "total", "active_billions"),
    [
        ("deepseek-v2-lite", 15_706_484_224, 2.45),
        ("deepseek-v3", 671_026_404_352, 36.6),
        ("deepseek-v3.1", 671_026_404_352, 36.6),
        ("deepseek-v3.2", 671_877_929_216, 37.5),
        *((f"deepseek-v4-flash{release}", 284_332_230_231, 13.3) for release in ("", "-base", "-0731")),
        *((f"deepseek-v4-pro{release}", 1_572_997_179_491, 48.85) for release in ("", "-base", "-0813")),
        ("kimi-k2", 1_026_408_209_408, 31.7),
        # No public library has it: what its authors say, 552e9 and 196e9 in tables, 16e9 active.
        ("deepseek-v4.1-flash", 551_566_149_744 + 314_654_720 + 196_613_849_600, 16.13),
    ],
)
def test_published_models(name, total, active_billions):
    counts = parameter_counts(presets.load(name))
    assert counts.total == total
    assert counts.active / 1e9 == pytest.approx(active_billions, abs=0.05)
    assert sum(counts.by_part.values()) == total


def test_a_token_that_skips_the_decoder():
    counts = parameter_counts(presets.load("deepseek-v4.1-flash"))
    assert (counts.active_remembering - counts.by_part["engram_fusion"]) / 1e9 == pytest.approx(7.6, abs=0.05)
    assert parameter_counts(presets.load("deepseek-v4-flash")).active_remembering is None


def test_engram_of_the_release():
    config = presets.load("deepseek-v4.1-flash")
    parts = parameter_counts(config).by_part
    assert parts["engram_tables"] == (384_006_168 + 384_016_682) * 256
    assert parts["engram_fusion"] == 2 * (5 * 5120 * 6144 + 2 * 4 * 5120)


#: Parts of the project's own designs, as they were designed.
DESIGNS = {
    "v4-1t": {
        "embedding": 926_679_040,
        "attention": 61 * 101_122_048,
        "dense_mlp": 3 * 7168 * 18432,
        "shared_experts": 60 * 3 * 7168 * 2048,
        "routed_experts": 60 * 288 * 3 * 7168 * 2048,
        "router": 60 * 288 * 7168,
        "engram_tables": (442_373_686 + 442_383_636) * 256,
        "engram_fusion": 2 * (2 * 7168 * 6144 + 2 * 7168),
        "norms": 61 * (2 * 7168 + 1536 + 512) + 7168,
        "reasoning_layers": 2 * (101_122_048 + 3 * 7168 * 18432 + 2 * 7168 + 1536 + 512),
        "reasoning_head": 2 * 7168 + 3 * 7168 * 7168 + 3 * 7168,
        "head": 926_679_040,
    },
    "v4-lite": {
        "embedding": 330_956_800,
        "attention": 32 * 22_839_296,
        "dense_mlp": 3 * 2560 * 10240,
        "shared_experts": 31 * 3 * 2560 * 2 * 1536,
        "routed_experts": 31 * 64 * 3 * 2560 * 1536,
        "router": 31 * 64 * 2560,
        "engram_tables": (44_681_344 + 44_685_358) * 80,
        "engram_fusion": 2 * (2 * 2560 * 1280 + 2 * 2560),
        "norms": 32 * (2 * 2560 + 768 + 512) + 2560,
        "reasoning_layers": 2 * (22_839_296 + 3 * 2560 * 10240 + 2 * 2560 + 768 + 512),
        "reasoning_head": 2 * 2560 + 3 * 2560 * 2560 + 3 * 2560,
        "head": 330_956_800,
    },
}
#: Their sizes with the routers' biases.
WHOLE = {"v4-1t": 1_000_023_221_632, "v4-lite": 32_997_405_728}
#: Billions at work for one token, and those that thoughts work on besides.
ACTIVE = {"v4-1t": (31.57, 1.15), "v4-lite": (4.08, 0.22)}


@pytest.mark.parametrize("name", DESIGNS)
def test_own_designs(name):
    config = presets.load(name)
    counts = parameter_counts(config)
    assert counts.by_part == DESIGNS[name]
    assert counts.total == sum(DESIGNS[name].values())
    assert counts.total + len(config.moe_layers) * config.num_experts == WHOLE[name]
    thinking = counts.by_part["reasoning_layers"] + counts.by_part["reasoning_head"]
    assert (counts.active / 1e9, thinking / 1e9) == pytest.approx(ACTIVE[name], abs=0.005)


def test_thoughts_of_no_steps_need_no_parameters():
    config = presets.load("v4-lite")
    counts = parameter_counts(config)
    without = parameter_counts(replace(config, reasoning=replace(config.reasoning, steps=0)))
    assert without == parameter_counts(replace(config, reasoning=None))
    assert without.active == counts.active and not any("reasoning" in part for part in without.by_part)


def test_tied_embedding_counts_once():
    config = presets.load("tiny-v3")
    plain, tied = parameter_counts(config), parameter_counts(replace(config, tie_word_embeddings=True))
    assert plain.total - tied.total == config.vocab_size * config.hidden_size
    assert plain.active == tied.active


def test_attention_bias():
    config = presets.load("tiny-v3")
    more = parameter_counts(replace(config, attention_bias=True)).total - parameter_counts(config).total
    assert more == config.num_layers * (config.q_lora_rank + config.latent_dim + config.hidden_size)


def test_parts_of_v4():
    config = presets.load("tiny-v4")
    parts = parameter_counts(config).by_part
    coefficients = 4 * 24 * 2 + 4  # of each layer's two sublayers, and of the head
    scales = 4 * 2 * 3 + 1
    assert parts["hyper_connections"] == coefficients * (4 * config.hidden_size + 1) + scales
    assert "dense_mlp" not in parts
    # Sinks, and a compressor's position biases, are part of attention.
    shorter = tuple(1 if ratio == 4 else ratio for ratio in config.compressed.ratios)
    without = parameter_counts(replace(config, compressed=replace(config.compressed, ratios=shorter))).by_part
    assert parts["attention"] - without["attention"] == 3 * 2 * (2 * 32 + 2 * 16)
