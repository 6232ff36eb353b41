"""DeepSeek-V4.1's nested configuration, and Engram's keys, which any family may have."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export import presets
from v4export.config import FULL, REINDEX, REUSE, WINDOW, Engram, Fp8Blocks, SharedEntries
from v4export.config.readers import read_config, table_rows, to_hub_config
from v4export.errors import BadInput, NotSupported, V4Error


def raw(**changes: Any) -> dict[str, Any]:
    """tiny-v4.1's config.json; changes are to its text model, and None drops a key."""
    content = json.loads(presets.path("tiny-v4.1").read_text())
    content["text_config"] |= changes
    content["text_config"] = {key: value for key, value in content["text_config"].items() if value is not None}
    return content


def test_what_is_read():
    config = presets.load("tiny-v4.1")
    shared = SharedEntries((2, 5), (2, 5, 6), 5, 6, 4)
    assert config.compressed.shared == shared and shared.decoder == 5
    assert config.compressed.layers == (WINDOW, WINDOW, FULL, REUSE, REUSE, FULL, REINDEX, REUSE)
    assert config.compressed.ratios == (0, 0, 2, 2, 2, 1, 1, 1)
    assert not config.compressed.norm_queries and config.hyper.single_pass
    assert config.fp8 == Fp8Blocks(32, 32, power_of_two=True)
    assert (config.rms_norm_eps, config.image_token_id, config.eos_token_ids) == (1e-20, 319, (1,))
    assert config.engram == Engram((1, 4), 4, 2, 32, 211, 233, 2)
    assert [config.is_decoder(i) for i in range(8)] == [False] * 5 + [True] * 3
    assert [config.has_indexer(i) for i in range(8)] == [False, False, True, False, False, True, True, False]


def test_the_release():
    config = presets.load("deepseek-v4.1-flash")
    assert config.fp4_experts and config.num_layers == 40
    assert table_rows(config.engram) == [384_006_168, 384_016_682]
    kinds = config.compressed.layers
    assert [i for i, kind in enumerate(kinds) if kind == FULL] == [2, 8, 14, 20]
    assert [i for i, kind in enumerate(kinds) if kind == REINDEX] == [24, 28, 32, 36]
    assert config.compressed.shared.decoder == 20


def test_keys_may_stand_outside():
    content = raw()
    text = content.pop("text_config")
    assert read_config(content | text | {"model_type": "deepseek_v41"}) == presets.load("tiny-v4.1")
    both = raw()
    both["hidden_size"] = 1
    with pytest.raises(BadInput, match=r"differ between config\.json and its text_config: hidden_size"):
        read_config(both)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"compress_ratios": [0, 0, 2, 1, 2, 1, 1, 1]}, NotSupported, r"compress_ratios\[3\] = 1"),
        ({"compress_ratios": [0, 1, 2, 2, 2, 1, 1, 1]}, NotSupported, r"compress_ratios\[1\] = 1"),
        ({"compress_ratios": [0, 0, 2]}, BadInput, "8 numbers"),
        ({"compress_ratios": [0, 0, 2, 2, 2, 1, 1, 1, 4]}, BadInput, "zeros for prediction stages"),
        ({"kv_source_layer_ids": [5, 2]}, BadInput, "layers in order"),
        ({"kv_source_layer_ids": [2, 9]}, BadInput, "each below 8"),
        ({"index_source_layer_ids": [2, 6]}, BadInput, "also selects among them"),
        ({"candidate_source_layer_id": 2}, BadInput, "blocks of the last entries"),
        ({"candidate_source_layer_id": 7}, BadInput, "kept by a layer that selects"),
        ({"candidate_block_size": 0}, BadInput, "blocks of the last entries"),
        ({"candidate_source_layer_id": "x"}, BadInput, "candidate_source_layer_id"),
        ({"model_type": "deepseek_v4"}, BadInput, "text_config.model_type"),
        ({"n_group": 2}, NotSupported, "not grouped"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, NotSupported, "rotary scaling"),
        ({"layer_types": []}, BadInput, "not known: layer_types"),
        ({"engram_num_embeddings": [1, 2]}, BadInput, r"add up to \[1461, 1453\]|add up to"),
        ({"engram_layer_ids": [1, 9]}, BadInput, "Engram"),
        ({"engram_layer_ids": [4, 1]}, BadInput, "Engram"),
        ({"engram_pad_token_id": 320}, BadInput, "Engram"),
        ({"engram_conv_kernel": 1}, BadInput, "Engram"),
        ({"engram_max_ngram_size": 1}, BadInput, "engram_max_ngram_size"),
        ({"engram_n_heads": None}, BadInput, "engram.heads"),
        ({"engram_layer_ids": None}, BadInput, "engram.layers"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], error: type[V4Error], text: str):
    with pytest.raises(error, match=text):
        read_config(raw(**change))


def test_no_engram():
    keys = [key for key in raw()["text_config"] if key.startswith("engram_")]
    assert read_config(raw(**dict.fromkeys(keys))).engram is None
    assert read_config(raw(engram_layer_ids=[])).engram is None
    assert "engram_layer_ids" not in to_hub_config(presets.load("tiny-v3"))


def test_the_first_layers():
    config = presets.load("tiny-v4.1")
    two = config.first_layers(2)
    assert two.compressed.shared is None and two.engram.layers == (1,)
    assert config.first_layers(1).engram is None
    # Tables of the layers that are left have the rows they had.
    assert table_rows(two.engram) == table_rows(config.engram)[:1]
    five = config.first_layers(5)
    assert five.compressed.shared == SharedEntries((2,), (2,), None, 6, 4)
    assert [five.is_decoder(i) for i in range(5)] == [False, False, True, True, True]


ENGRAM = st.builds(
    Engram,
    st.sets(st.integers(0, 2), min_size=1).map(lambda layers: tuple(sorted(layers))),
    max_order=st.integers(2, 5),
    heads=st.integers(1, 9),
    width=st.integers(1, 512),
    buckets=st.integers(2, 1 << 20),
    compressed_vocab=st.integers(1, 1 << 17),
    pad_token_id=st.integers(0, 255),
    seed=st.integers(0, 1 << 30),
    kernel=st.sampled_from([0, 2, 4]),
    dilation=st.integers(1, 9),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["tiny-v2-lite", "tiny-v3", "tiny-v3.2", "tiny-kimi-k2", "tiny-v4", "tiny-v4.1"]), ENGRAM)
def test_any_family_may_carry_engram(name: str, engram: Engram):
    config = replace(presets.load(name), engram=engram)
    assert read_config(json.loads(json.dumps(to_hub_config(config)))) == config


@st.composite
def v41_configs(draw: Any) -> Any:
    base = presets.load("tiny-v4.1")
    layers = draw(st.integers(1, 9))
    kv = sorted(draw(st.sets(st.integers(0, layers - 1), max_size=3)))
    index = sorted({*kv, *draw(st.sets(st.integers(kv[0], layers - 1)))}) if kv else []
    ratios = [0] * layers
    for source in kv:
        ratios[source:] = [draw(st.integers(1, 4))] * (layers - source)
    kinds = [WINDOW if not r else FULL if i in kv else REINDEX if i in index else REUSE for i, r in enumerate(ratios)]
    candidates = draw(st.sampled_from([None, *(i for i in index if i >= kv[-1])])) if kv else None
    shared = SharedEntries(tuple(kv), tuple(index), candidates, *draw(st.tuples(*[st.integers(1, 4096)] * 2)))
    return replace(
        base,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        engram=None,
        compressed=replace(base.compressed, layers=tuple(kinds), ratios=tuple(ratios), shared=shared if kv else None),
        fp4_experts=draw(st.booleans()),
        num_mtp_layers=draw(st.integers(0, 3)),
    )


@settings(max_examples=100, deadline=None)
@given(v41_configs())
def test_round_trip(config: Any):
    assert read_config(copy.deepcopy(to_hub_config(config))) == config
