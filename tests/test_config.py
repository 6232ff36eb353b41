from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4export import presets
from v4export.config import CSA, ENTROPY, HCA, MARGIN, WINDOW, Fp8Blocks, Indexer, Reasoning, Yarn
from v4export.config.keys import COMMON
from v4export.config.readers import FAMILIES, read_config, to_hub_config
from v4export.config.values import REQUIRED
from v4export.errors import BadInput, NotSupported

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def raw(name="tiny-v3", **changes):
    return json.loads(presets.path(name).read_text()) | changes


@pytest.mark.parametrize("name", presets.names())
def test_round_trip_of_presets(name):
    config = presets.load(name)
    assert read_config(to_hub_config(config)) == config
    assert json.loads(json.dumps(to_hub_config(config))) == to_hub_config(config)


#: What is written out once each.
WRITTEN_OUT = st.integers(1, 4096)


@st.composite
def configs(draw):
    base = presets.load(draw(st.sampled_from(["tiny-v2-lite", "tiny-v3", "tiny-kimi-k2"])))
    size = st.integers(1, 1 << 20)
    ratio = st.floats(1e-6, 1e6)
    layers = draw(st.integers(1, 9))
    groups = draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    per_group = draw(st.integers(2, 8))
    chosen = draw(st.integers(1, per_group * kept))
    yarn = st.builds(Yarn, ratio, size, ratio, ratio, st.floats(0, 2), st.floats(0, 2))
    token = st.none() | st.integers(0, 99)
    indexer = st.builds(Indexer, size, st.integers(base.qk_rope_head_dim, 512), size)
    return replace(
        base,
        num_layers=layers,
        moe_layers=tuple(range(draw(st.integers(0, layers)), layers)),
        hidden_size=draw(size),
        q_lora_rank=draw(st.none() | size),
        num_experts=groups * per_group,
        num_groups=groups,
        topk_groups=kept,
        experts_per_token=chosen,
        num_shared_experts=draw(st.integers(0, 3)),
        rms_norm_eps=draw(ratio),
        rope_theta=draw(ratio),
        yarn=draw(st.none() | yarn),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        num_mtp_layers=draw(st.integers(0, 3)),
        bos_token_id=draw(token),
        pad_token_id=draw(token),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        fp8=draw(st.none() | st.builds(Fp8Blocks, size, size, st.booleans())),
        indexer=base.indexer and draw(indexer),
    )


@st.composite
def v4_configs(draw):
    base = presets.load("tiny-v4")
    size, ratio = st.integers(1, 1 << 20), st.floats(1e-6, 1e6)
    layers = draw(st.integers(1, 9))
    kinds = draw(st.lists(st.sampled_from([WINDOW, CSA, HCA]), min_size=layers, max_size=layers))
    groups, width = draw(st.integers(1, 8)), draw(st.integers(4, 600))
    rotated = 2 * draw(st.integers(1, width // 2))
    rates = draw(st.sampled_from([(4, 128), (8, 64), (4, 64)]))
    indexer = st.builds(Indexer, size, st.integers(rotated, 1024), size)
    return replace(
        base,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        hidden_size=32 * draw(size),
        moe_intermediate_size=32 * draw(size),
        num_heads=groups * draw(st.integers(1, 9)),
        qk_rope_head_dim=rotated,
        compressed=replace(
            base.compressed,
            head_dim=width,
            window=draw(size),
            o_groups=groups,
            o_lora_rank=draw(size),
            layers=tuple(kinds),
            rope_theta=draw(ratio),
            ratios=tuple({WINDOW: 0, CSA: rates[0], HCA: rates[1]}[kind] for kind in kinds),
        ),
        indexer=draw(indexer if CSA in kinds else st.none() | indexer),
        hyper=replace(
            base.hyper, streams=draw(st.integers(1, 9)), sinkhorn_iterations=draw(WRITTEN_OUT), eps=draw(ratio)
        ),
        hash_layers=tuple(i for i in range(layers) if draw(st.booleans())),
        swiglu_limit=draw(ratio),
        rope_theta=draw(ratio),
        yarn=draw(st.none() | st.builds(Yarn, ratio, size, ratio, ratio, st.just(0.0), st.just(0.0))),
        num_mtp_layers=draw(st.integers(0, 3)),
        tie_word_embeddings=draw(st.booleans()),
        fp8=draw(st.none() | st.builds(Fp8Blocks, size, size, st.booleans())),
        fp4_experts=draw(st.booleans()),
    )


@settings(max_examples=100, deadline=None)
@given(configs() | v4_configs())
def test_round_trip(config):
    assert read_config(json.loads(json.dumps(to_hub_config(config)))) == config


def test_sources(tmp_path):
    config = presets.load("tiny-v3")
    (tmp_path / "config.json").write_text(json.dumps(raw()))
    assert read_config(tmp_path) == read_config(str(tmp_path)) == read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_files_that_are_no_configuration(tmp_path, text):
    with pytest.raises(BadInput, match="cannot read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(BadInput, match=r"not JSON|not a model"):
        read_config(tmp_path)


def test_unknown_model_type():
    for family in ("deepseek_v5", None, 3, ["deepseek_v3"]):
        with pytest.raises(BadInput) as error:
            read_config(raw(model_type=family))
        assert repr(family) in str(error.value)
        assert "deepseek_v2, deepseek_v3, deepseek_v32, deepseek_v4, deepseek_v41, kimi_k2, v4x" in str(error.value)
    with pytest.raises(BadInput, match="unknown model_type None"):
        read_config({})


def test_unknown_key():
    with pytest.raises(BadInput, match=r"not known: hidden_sizes\n.*= 12\n.*Did you mean hidden_size\?"):
        read_config(raw(hidden_sizes=12))
    with pytest.raises(BadInput, match=r"rope_scaling has keys that are not known: beta"):
        read_config(raw(rope_scaling=YARN | {"beta": 1}))
    with pytest.raises(BadInput, match=r"quantization_config has keys that are not known: bits"):
        read_config(raw(quantization_config=FP8 | {"bits": 8}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_is_in_one_table(family):
    tables = FAMILIES[family]
    assert not tables.keys.keys() & tables.irrelevant.keys()
    assert not tables.limited.keys() & tables.irrelevant.keys()
    assert not tables.keys.keys() & tables.limited.keys()


@pytest.mark.parametrize("key", [name for name, key in COMMON.items() if key.default is REQUIRED])
def test_missing_key(key):
    content = raw()
    del content[key]
    with pytest.raises(BadInput, match=f"config key {key} is missing"):
        read_config(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "7168"),
        ("hidden_size", 71.5),
        ("hidden_size", True),
        ("hidden_size", None),
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("q_lora_rank", 0),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", "10000"),
        ("norm_topk_prob", 1),
        ("tie_word_embeddings", "false"),
        ("eos_token_id", [1, -2]),
        ("bos_token_id", 1.5),
        ("scoring_func", None),
        ("torch_dtype", 16),
        ("rope_scaling", "yarn"),
        ("quantization_config", "fp8"),
    ],
)
def test_wrong_value(key, value):
    with pytest.raises(BadInput, match=key):
        read_config(raw(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"n_group": 3}, "num_experts = 16, num_groups = 3"),
        ({"topk_group": 5}, "topk_groups = 5, num_groups = 4"),
        ({"num_experts_per_tok": 9}, "experts_per_token = 9"),
        ({"n_group": 16}, "num_experts = 16, num_groups = 16"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ({"qk_head_dim": 25}, "qk_head_dim = 25; wanted 24"),
        ({"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types"),
        ({"dtype": "float32"}, "torch_dtype and dtype disagree"),
        ({"rope_parameters": YARN | {"rope_theta": 5.0}}, "rope_theta"),
    ],
)
def test_contradictions(changes, shown):
    with pytest.raises(BadInput, match=shown):
        read_config(raw(**changes))


def test_greedy_ignores_groups():
    assert read_config(raw("tiny-v2-lite", n_group=8, topk_group=1)).experts_per_token == 3
    with pytest.raises(BadInput, match="kept groups hold"):
        read_config(raw("tiny-v2-lite", n_group=8, topk_group=1, topk_method="group_limited_greedy"))
    with pytest.raises(BadInput, match="than exist"):
        read_config(raw("tiny-v2-lite", num_experts_per_tok=9))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("tiny-v3", "hidden_act", "gelu"),
        ("tiny-v3", "moe_layer_freq", 2),
        ("tiny-v3", "rope_interleave", False),
        ("tiny-v3", "mlp_bias", True),
        ("tiny-v3", "num_key_value_heads", 2),
        ("tiny-v3", "scoring_func", "softmax"),
        ("tiny-v3", "topk_method", "greedy"),
        ("tiny-v2-lite", "scoring_func", "sigmoid"),
        ("tiny-v2-lite", "topk_method", "noaux_tc"),
        ("tiny-v2-lite", "norm_topk_prob", True),
        ("tiny-v3", "torch_dtype", "float8_e4m3fn"),
        ("tiny-v3", "expert_dtype", "fp4"),
        ("tiny-v3", "rope_scaling", {"type": "linear", "factor": 2}),
        ("tiny-v3", "rope_scaling", {"factor": 2}),
        ("tiny-v3", "rope_scaling", YARN | {"attention_factor": 1.5}),
        ("tiny-v3", "rope_scaling", YARN | {"truncate": False}),
    ],
)
def test_not_supported(name, key, value):
    with pytest.raises(NotSupported) as error:
        read_config(raw(name, **{key: value}))
    assert error.value.exit_code == 4
    assert key.split("_")[0] in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "awq", "bits": 4},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"scale_fmt": "other"},
        {"expert_dtype": "fp4"},
    ],
)
def test_other_quantisation(changes):
    key = next(iter(changes))
    with pytest.raises(NotSupported, match=f"{key} = '{changes[key]}'"):
        read_config(raw(quantization_config=FP8 | changes))


@pytest.mark.parametrize("block", [None, 128, [128], [128, 128, 1], [128, 0], ["128", 128]])
def test_block_sizes(block):
    with pytest.raises(BadInput, match="weight_block_size"):
        read_config(raw(quantization_config=FP8 | {"weight_block_size": block}))


def test_quantisation():
    assert read_config(raw(quantization_config=FP8)).fp8 == Fp8Blocks()
    assert read_config(raw(quantization_config=FP8 | {"scale_fmt": "ue8m0"})).fp8 == Fp8Blocks(power_of_two=True)
    assert read_config(raw(quantization_config=None)).fp8 is None


def test_both_spellings_of_rotary_options():
    hub = raw(rope_theta=123.0, rope_scaling=YARN | {"mscale": 0.5})
    later = {key: value for key, value in hub.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    parameters = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.5}
    later |= {"rope_parameters": parameters | {"rope_theta": 123.0}, "dtype": "bfloat16"}
    assert read_config(hub) == read_config(later)
    assert read_config(hub).yarn == Yarn(40.0, 4096, mscale=0.5)
    for none in (None, {}, {"rope_type": "default"}):
        assert read_config(raw(rope_scaling=none)).yarn is None
    with pytest.raises(BadInput, match="factor is missing"):
        read_config(raw(rope_scaling={"type": "yarn", "original_max_position_embeddings": 4096}))
    del hub["rope_theta"]
    with pytest.raises(BadInput, match="rope_theta"):
        read_config(hub)


def test_all_layers_dense():
    config = read_config(raw(first_k_dense_replace=9))
    assert config.moe_layers == ()
    assert read_config(to_hub_config(config)) == config


def test_expert_layers_that_a_hub_configuration_cannot_say():
    with pytest.raises(NotSupported, match="moe_layers"):
        to_hub_config(replace(presets.load("tiny-v3"), moe_layers=(0, 2)))


def test_indexer_of_v32():
    assert presets.load("deepseek-v3.2").indexer == Indexer(64, 128, 2048)
    assert presets.load("tiny-v3").indexer is None
    named = ["indexed_attention"] * 3
    assert read_config(raw("tiny-v3.2", layer_types=named)) == presets.load("tiny-v3.2")
    with pytest.raises(NotSupported, match="layer_types"):
        read_config(raw("tiny-v3.2", layer_types=[*named[1:], "full_attention"]))
    with pytest.raises(BadInput, match="index_topk is missing"):
        read_config({key: value for key, value in raw("tiny-v3.2").items() if key != "index_topk"})
    with pytest.raises(BadInput, match=r"qk_rope_head_dim = 8, indexer\.head_dim = 4"):
        read_config(raw("tiny-v3.2", index_head_dim=4))
    with pytest.raises(BadInput, match="not known: index_topk"):
        read_config(raw("tiny-v3", index_topk=4))


V4_YARN = {"factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64}
NAMED = {
    "layer_types": [
        "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
        "compressed_sparse_attention",
    ],
    "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "compress": V4_YARN
        | {"rope_type": "yarn", "type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": 0.25,
           "attention_factor": 1.0},
    },
}  # fmt: skip
NATIVE = {
    "compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_theta", "compress_rope_theta", "rope_scaling"
}  # fmt: skip


def named(**changes):
    """tiny-v4 as transformers spells it."""
    return {key: value for key, value in raw("tiny-v4").items() if key not in NATIVE} | NAMED | changes


def test_both_spellings_of_v4():
    config = presets.load("tiny-v4")
    assert read_config(named()) == config
    assert read_config(raw("tiny-v4", **NAMED)) == config
    assert config.compressed.layers == (WINDOW, CSA, HCA, CSA)
    assert config.hash_layers == (0, 1)
    assert (config.rope_theta, config.compressed.rope_theta) == (10000, 160000)
    # Neither cos and sin nor the softmax scale are stretched.
    assert config.yarn.rotary_magnitude == config.yarn.softmax_correction == 1
    assert config.softmax_scale == 32**-0.5
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    other = read_config(named(compress_rates=rates, mlp_layer_types=["moe", "hash_moe", "moe", "hash_moe"]))
    assert (other.compressed.ratios, other.hash_layers) == ((0, 8, 64, 8), (1, 3))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"compress_ratios": [0, 4, 128, 128]}, "compress_ratios and layer_types"),
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_ratios and compress_rates"),
        ({"num_hash_layers": 1}, "num_hash_layers and mlp_layer_types"),
        ({"qk_rope_head_dim": 4}, "qk_rope_head_dim and partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "qk_rope_head_dim and partial_rotary_factor"),
        ({"rope_theta": 5.0}, r"rope_theta and rope_parameters\.main\.rope_theta"),
        ({"compress_rope_theta": 5.0}, r"compress_rope_theta and rope_parameters\.compress\.rope_theta"),
        ({"rope_scaling": V4_YARN | {"type": "yarn", "factor": 8}}, r"rope_scaling and rope_parameters\.compress"),
    ],
)
def test_spellings_of_v4_that_disagree(change, keys):
    with pytest.raises(BadInput, match=f"config keys {keys} disagree"):
        read_config(raw("tiny-v4", **NAMED | change))


@pytest.mark.parametrize("tail", [[], [0], [0, 0, 0]])
def test_entries_of_prediction_stages(tail):
    config = presets.load("tiny-v4")
    assert read_config(raw("tiny-v4", compress_ratios=[0, 4, 128, 4, *tail])) == config
    with pytest.raises(BadInput, match="entries that belong to no layer"):
        read_config(raw("tiny-v4", compress_ratios=[0, 4, 128, 4, *tail, 4]))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"compress_ratios": [0, 4, 128]}, "compress_ratios"),
        ({"compress_ratios": [0, 4, 128, "4"]}, "compress_ratios"),
        ({"compress_ratios": None}, "compress_ratios or layer_types is missing"),
        ({"num_hash_layers": 5}, r"num_layers = 4, hash_layers = \(0, 1, 2, 3, 4\)"),
        ({"num_hash_layers": None}, "num_hash_layers or mlp_layer_types is missing"),
        ({"o_groups": 3}, r"num_heads = 4, compressed\.o_groups = 3"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ({"qk_rope_head_dim": 34, "index_head_dim": 64}, r"qk_rope_head_dim = 34, compressed\.head_dim = 32"),
        ({"index_head_dim": 4}, r"indexer\.head_dim = 4"),
        ({"index_head_dim": None}, r"indexer are missing\n.*indexer\.head_dim"),
        ({"index_head_dim": None, "index_n_heads": None, "index_topk": None}, "needs an indexer"),
        ({"expert_dtype": "fp4", "hidden_size": 80}, "hidden_size = 80"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"hc_mult": 0}, "hc_mult"),
        ({"swiglu_limit": -1}, "swiglu_limit"),
        ({"first_k_dense_replace": 1}, "not known: first_k_dense_replace"),
        ({"rope_scaling": V4_YARN | {"type": "yarn", "mscale": 1}}, "rope_scaling has keys that are not known: mscale"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"compress_rates": {"other": 4}}, "compress_rates"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
        (
            {"expert_dtype": "fp8", "quantization_config": FP8 | {"expert_dtype": "fp4"}},
            r"expert_dtype and quantization_config\.expert_dtype disagree",
        ),
    ],
)
def test_v4_that_contradicts(changes, shown):
    with pytest.raises(BadInput, match=shown):
        read_config(raw("tiny-v4", **changes))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"compress_ratios": [0, 2, 128, 4]}, "compress_ratios has 2"),
        ({"norm_topk_prob": False}, "norm_topk_prob = false; wanted true"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"expert_dtype": "int4"}, "expert_dtype"),
        ({"vision_config": {"patch": 14}}, "vision_config"),
        ({"rope_scaling": V4_YARN | {"type": "yarn", "attention_factor": 1.3}}, "attention_factor"),
        ({"rope_parameters": {"main": V4_YARN | {"rope_type": "yarn"}}}, "rotary scaling"),
    ],
)
def test_v4_that_is_not_supported(changes, shown):
    with pytest.raises(NotSupported, match=shown):
        read_config(raw("tiny-v4", **changes))


def test_where_v4_says_what_its_experts_are():
    for place in ({"expert_dtype": "fp4"}, {"quantization_config": FP8 | {"expert_dtype": "fp4"}}):
        assert read_config(raw("tiny-v4", moe_intermediate_size=64, **place)).fp4_experts
    for place in ({}, {"expert_dtype": "fp8"}, {"expert_dtype": None}, {"quantization_config": FP8}):
        assert not read_config(raw("tiny-v4", **place)).fp4_experts
    assert "expert_dtype" not in to_hub_config(presets.load("tiny-v4"))


def test_v4_is_written_as_deepseek_writes_it():
    written = to_hub_config(presets.load("deepseek-v4-flash"))
    published = raw("deepseek-v4-flash")
    assert {key: value for key, value in published.items() if key in written} == {
        key: value for key, value in written.items() if key in published
    } | {"rope_scaling": published["rope_scaling"]}
    assert published.keys() - written.keys() == {"attention_dropout", "initializer_range", "use_cache"}


THOUGHTS = {"reasoning_num_layers": 2, "reasoning_num_steps": 4}
#: What reasoning layers cannot have in common with attention that is not latent.
LATENT_SIZES = {
    "reasoning_kv_lora_rank": 24,
    "reasoning_qk_nope_head_dim": 16,
    "reasoning_v_head_dim": 16,
    "reasoning_intermediate_size": 80,
}
SIZE = st.integers(1, 1 << 20)
REASONING = st.builds(
    Reasoning,
    WRITTEN_OUT,
    st.integers(0, 99),
    num_heads=st.none() | SIZE,
    q_lora_rank=st.none() | SIZE,
    kv_lora_rank=SIZE,
    qk_nope_head_dim=SIZE,
    qk_rope_head_dim=st.none() | SIZE.map(lambda pairs: 2 * pairs),
    v_head_dim=SIZE,
    intermediate_size=SIZE,
    confidence=st.sampled_from([ENTROPY, MARGIN]),
    threshold=st.floats(0, 1e6),
)
V4X = replace(presets.load("tiny-v3"), family="v4x")
CARRIERS = {name: presets.load(name) for name in ("tiny-v3", "tiny-v3.2", "tiny-v4", "tiny-v4.1")} | {"v4x": V4X}


@pytest.mark.parametrize("base", CARRIERS.values(), ids=CARRIERS)
@settings(max_examples=20, deadline=None)
@given(reasoning=REASONING)
def test_any_family_may_have_reasoning_layers(base, reasoning):
    config = replace(base, reasoning=reasoning)
    assert read_config(json.loads(json.dumps(to_hub_config(config)))) == config
    assert config.thinks == (reasoning.steps > 0)
    assert config.state_layers == base.num_layers + (reasoning.layers if config.thinks else 0)


def test_no_reasoning_layers():
    assert presets.load("tiny-v3").reasoning is None and not presets.load("tiny-v3").thinks
    assert not any(key.startswith("reasoning_") for key in to_hub_config(presets.load("tiny-v3")))
    assert read_config(raw(**dict.fromkeys(THOUGHTS | LATENT_SIZES))) == presets.load("tiny-v3")


def test_reasoning_layers_have_the_sizes_of_the_models_own():
    config = read_config(raw(**THOUGHTS))
    assert config == replace(presets.load("tiny-v3"), reasoning=Reasoning(2, 4, confidence=ENTROPY, threshold=1.0))
    own = config.thinker
    assert own == replace(presets.load("tiny-v3"), num_layers=2, moe_layers=())
    assert read_config(raw(**THOUGHTS, reasoning_num_heads=3)).thinker == replace(own, num_heads=3)
    assert read_config(raw("tiny-v3.2", **THOUGHTS)).thinker.indexer is None


@pytest.mark.parametrize("name", ["tiny-v4", "tiny-v4.1"])
def test_reasoning_layers_beside_compressed_attention(name):
    reasoning = Reasoning(2, 4, kv_lora_rank=24, qk_nope_head_dim=16, v_head_dim=16, intermediate_size=80)
    config = replace(presets.load(name), reasoning=reasoning)
    own = config.thinker
    assert own.latent_dim == 24 + config.qk_rope_head_dim
    assert (own.num_heads, own.q_lora_rank) == (config.num_heads, config.q_lora_rank)
    assert own.compressed is own.indexer is own.hyper is own.engram is None and own.hash_layers == ()
    # Rotated as entries are: neither cos and sin nor the softmax scale are stretched.
    assert (own.rope_theta, own.yarn.factor) == (config.compressed.rope_theta, config.yarn.factor)
    assert own.yarn.rotary_magnitude == own.yarn.softmax_correction == 1
    assert own.softmax_scale == own.qk_head_dim**-0.5


def test_thoughts_of_no_steps():
    config = read_config(raw(**THOUGHTS | {"reasoning_num_steps": 0}))
    assert config.reasoning == Reasoning(2, 0)
    assert not config.thinks and config.state_layers == config.num_layers


@pytest.mark.parametrize("missing", [list(LATENT_SIZES), ["reasoning_kv_lora_rank"], ["reasoning_v_head_dim"]])
def test_reasoning_layers_of_no_size(missing):
    given = {key: value for key, value in LATENT_SIZES.items() if key not in missing}
    with pytest.raises(BadInput, match=f"sizes of the reasoning layers are missing\n *{', '.join(missing)};"):
        read_config(raw("tiny-v4", **THOUGHTS | given))


@pytest.mark.parametrize(
    ("changes", "error", "shown"),
    [
        ({"reasoning_num_layers": 2}, BadInput, r"reasoning are missing\n *reasoning\.steps"),
        ({"reasoning_num_steps": 4}, BadInput, r"reasoning are missing\n *reasoning\.layers"),
        ({"reasoning_threshold": 2.0}, BadInput, r"reasoning are missing\n *reasoning\.layers, reasoning\.steps"),
        (THOUGHTS | {"reasoning_num_layers": 0}, BadInput, "reasoning_num_layers = 0"),
        (THOUGHTS | {"reasoning_num_steps": -1}, BadInput, "reasoning_num_steps = -1"),
        (THOUGHTS | {"reasoning_num_heads": 0}, BadInput, "reasoning_num_heads = 0"),
        (THOUGHTS | {"reasoning_qk_rope_head_dim": 7}, BadInput, "reasoning_qk_rope_head_dim = 7"),
        (THOUGHTS | {"reasoning_confidence": "doubt"}, NotSupported, "reasoning_confidence = 'doubt'"),
        (THOUGHTS | {"reasoning_confidence": None}, BadInput, "reasoning_confidence = None"),
        (THOUGHTS | {"reasoning_threshold": -0.5}, BadInput, "reasoning_threshold = -0.5"),
        (THOUGHTS | {"reasoning_threshold": True}, BadInput, "reasoning_threshold = True"),
        (THOUGHTS | {"reasoning_layers": 2}, BadInput, "not known: reasoning_layers"),
    ],
)
def test_reasoning_layers_that_cannot_be(changes, error, shown):
    with pytest.raises(error, match=shown):
        read_config(raw(**changes))
