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
    ],
)
def test_published_models(name, total, active_billions):
    counts = parameter_counts(presets.load(name))
    assert counts.total == total
    assert counts.active / 1e9 == pytest.approx(active_billions, abs=0.05)
    assert sum(counts.by_part.values()) == total


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
