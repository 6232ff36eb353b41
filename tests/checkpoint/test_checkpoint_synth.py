from __future__ import annotations

import os
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from tokenizers import Tokenizer

from v4export import presets
from v4export.checkpoint import synth as module
from v4export.checkpoint.audit import audit
from v4export.checkpoint.count import parameter_counts
from v4export.checkpoint.formats import decode, dequantize_blocks, dequantize_fp4, quantize_fp4
from v4export.checkpoint.index import INDEX, Checkpoint
from v4export.checkpoint.synth import synth
from v4export.config import Fp8Blocks, Reasoning
from v4export.errors import BadInput, NotEnough, NotSupported

CONFIG = presets.load("tiny-v3")


def decoded(directory):
    return {name: weight.decode() for name, weight in audit(Checkpoint.open(directory)).weights.items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_values_depend_on_the_seed_alone(tmp_path, monkeypatch):
    first = decoded(synth(CONFIG, tmp_path / "a"))
    assert same(first, decoded(synth(CONFIG, tmp_path / "b", shard_bytes=1)))
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert same(first, decoded(synth(CONFIG, tmp_path / "c")))
    assert not same(first, decoded(synth(CONFIG, tmp_path / "d", seed=1)))


def test_chunks_of_fp8_are_whole_blocks(tmp_path, monkeypatch):
    config = replace(presets.load("tiny-v3.1"), fp8=Fp8Blocks(16, 32))
    first = decoded(synth(config, tmp_path / "a"))
    monkeypatch.setattr(module, "_CHUNK", 100)
    # One tensor a shard: a scale is never in its weight's.
    assert same(first, decoded(synth(config, tmp_path / "b", shard_bytes=1)))


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_dtypes(tmp_path, dtype, stored):
    checkpoint = Checkpoint.open(synth(CONFIG, tmp_path / "a", dtype=dtype))
    bias = {name for name in checkpoint.tensors if name.endswith("e_score_correction_bias")}
    assert bias
    assert {tensor.dtype for name, tensor in checkpoint.tensors.items() if name not in bias} == {stored}
    assert {checkpoint.tensors[name].dtype for name in bias} == {"F32"}
    assert checkpoint.config == replace(CONFIG, dtype=dtype)


def test_statistics(tmp_path):
    values = decoded(synth(CONFIG, tmp_path / "a"))
    assert values["model.embed_tokens.weight"].std() == pytest.approx(1, rel=0.02)
    assert values["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(208**-0.5, rel=0.02)
    assert values["model.norm.weight"].mean() == pytest.approx(1, abs=0.05)


def test_fp8(tmp_path):
    config = presets.load("tiny-v3.1")
    checkpoint = Checkpoint.open(synth(config, tmp_path / "fp8"))
    plain = decoded(synth(replace(config, fp8=None, dtype="float32"), tmp_path / "plain"))
    name = "model.layers.0.mlp.gate_proj.weight"
    scale = checkpoint.tensors[name + "_scale_inv"].read()
    assert scale.dtype == np.float32
    assert scale.shape == (2, 2)
    np.testing.assert_array_equal(np.frexp(scale)[0], 0.5)
    values = dequantize_blocks(checkpoint.tensors[name].read(), scale, (128, 128))
    np.testing.assert_allclose(values, plain[name], rtol=2**-4, atol=1e-4)
    kept = {n for n, t in checkpoint.tensors.items() if t.dtype == "BF16"}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight"} <= kept


def test_the_safetensors_library_reads_it(tiny):
    for directory in tiny.values():
        library = dict(deserialize((directory / "model.safetensors").read_bytes()))
        for tensor in Checkpoint.open(directory).tensors.values():
            name = tensor.name
            assert (library[name]["dtype"], tuple(library[name]["shape"])) == (tensor.dtype, tensor.shape)
            assert library[name]["data"] == tensor.read().tobytes()
            assert tensor.offset % tensor.numpy().dtype.itemsize == 0


def test_shards(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    assert (sharded / INDEX).exists()
    assert all(file.stat().st_size < 450_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


def test_progress_sums_to_the_size(tmp_path):
    for sparse in (False, True):
        seen = []
        checkpoint = Checkpoint.open(synth(CONFIG, tmp_path / str(sparse), sparse=sparse, advance=seen.append))
        assert sum(seen) == checkpoint.nbytes


@pytest.mark.parametrize("name", ["tiny-v3.1", "tiny-v3.2", "tiny-v4", "tiny-v4-fp4", "deepseek-v2-lite"])
def test_sparse_takes_no_disk(tmp_path, name):
    config = presets.load(name)
    directory = synth(config, tmp_path / "sparse", sparse=True)
    checkpoint = Checkpoint.open(directory)
    assert sum(os.stat(file).st_blocks * 512 for file in checkpoint.files) < 4_000_000
    if name == "deepseek-v2-lite":
        assert checkpoint.nbytes == 2 * parameter_counts(config).total
    seen = []
    assert audit(checkpoint, advance=seen.append).counts["skipped"] == 0
    assert sum(seen) == checkpoint.nbytes


def test_v4(tmp_path):
    config = presets.load("tiny-v4")
    checkpoint = Checkpoint.open(synth(config, tmp_path / "v4"))
    values = decoded(checkpoint.directory)
    assert all(tensor.name.startswith(("layers.", "embed.", "norm.", "head.", "hc_head_"))
               for tensor in checkpoint.tensors.values())  # fmt: skip
    layer = "model.layers.1."
    assert checkpoint.tensors[layer + "self_attn.sinks"].dtype == "F32"
    assert checkpoint.tensors[layer + "self_attn.compressor.gate_proj.weight"].dtype == "BF16"
    assert values[layer + "attn_hc.scale"] == pytest.approx(1, abs=0.5)
    assert values[layer + "attn_hc.base"].std() == pytest.approx(0.5, abs=0.2)
    assert values[layer + "attn_hc.fn"].std() == pytest.approx(384**-0.5, rel=0.05)
    assert values[layer + "self_attn.compressor.position_bias"].std() == pytest.approx(1, abs=0.2)
    table = values[layer + "mlp.gate.tid2eid"]
    assert table.shape == (320, 2) and {*table.flat} == set(range(8))
    assert (table[:, 0] != table[:, 1]).all()
    assert not (table[1:] == table[:-1]).all(axis=1).all()


def test_hash_table_in_chunks(tmp_path, monkeypatch):
    config = presets.load("tiny-v4")
    first = decoded(synth(config, tmp_path / "a"))
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert same(first, decoded(synth(config, tmp_path / "b", shard_bytes=1)))


@pytest.mark.parametrize("fused", [False, True])
def test_fp4(tmp_path, fused):
    config = presets.load("tiny-v4-fp4")
    checkpoint = Checkpoint.open(synth(config, tmp_path / "fp4", fused=fused))
    values = decoded(checkpoint.directory)
    plain = decoded(synth(replace(config, fp8=None, fp4_experts=False, dtype="float32"), tmp_path / "plain"))
    expert, shared = (f"model.layers.2.mlp.{part}.up_proj.weight" for part in ("experts.3", "shared_experts"))
    weights = audit(checkpoint).weights
    assert weights[expert].data.dtype == "I8" and weights[expert].data.shape == (64, 48)
    assert weights[expert].scale.dtype == "F8_E8M0" and weights[expert].scale.shape == (64, 3)
    assert weights[shared].data.dtype == "F8_E4M3" and weights[shared].scale.dtype == "F8_E8M0"
    np.testing.assert_array_equal(values[expert], dequantize_fp4(*quantize_fp4(plain[expert])))
    np.testing.assert_allclose(values[shared], plain[shared], rtol=2**-4, atol=1e-3)
    kept = "model.layers.1.self_attn.compressor.indexer.scorer.weights_proj.weight"
    assert weights[kept].data.dtype == "BF16"


@pytest.mark.parametrize(("name", "layers"), [("tiny-v3", "BF16"), ("tiny-v3.1", "F8_E4M3"), ("tiny-v4", "BF16")])
def test_reasoning_layers(tmp_path, name, layers):
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 80}
    config = replace(presets.load(name), reasoning=Reasoning(1, 3, **sizes))
    checkpoint = Checkpoint.open(synth(config, tmp_path / "a"))
    values, below, D = decoded(checkpoint.directory), "model.reasoning.", config.hidden_size
    # No release has them, so DeepSeek has no names of its own for them.
    assert all(t.name == n for n, t in checkpoint.tensors.items() if n.startswith(below))
    assert checkpoint.tensors[below + "layers.0.mlp.up_proj.weight"].dtype == layers
    assert checkpoint.tensors[below + "talk_head.0.weight"].dtype == "BF16"
    assert values[below + "layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (24 + config.qk_rope_head_dim, D)
    assert values[below + "start_embedding"].std() == pytest.approx(1, abs=0.2)
    assert values[below + "talk_head.0.weight"].std() == pytest.approx((2 * D) ** -0.5, rel=0.05)
    assert values[below + "talk_head.2.bias"].std() == pytest.approx(0.1, abs=0.03)
    # What is before them is as it is without them.
    without = decoded(synth(presets.load(name), tmp_path / "b"))
    assert same(without, {n: value for n, value in values.items() if n in without})


@pytest.mark.slow
def test_a_terabyte_takes_no_disk(tmp_path):
    checkpoint = Checkpoint.open(synth(presets.load("kimi-k2"), tmp_path / "k2", sparse=True))
    assert checkpoint.nbytes > 1_000_000_000_000
    assert sum(os.stat(file).st_blocks * 512 for file in checkpoint.files) < 40_000_000
    assert audit(checkpoint).counts["skipped"] == 0


def test_existing_directory_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(BadInput, match="exists"):
        synth(CONFIG, tmp_path / "a")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_nothing_is_left_when_it_fails(tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(CONFIG, tmp_path / "a", advance=stop)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="dtype"):
        synth(CONFIG, tmp_path / "a", dtype="int8")
    with pytest.raises(BadInput, match="shard_bytes = 0"):
        synth(CONFIG, tmp_path / "a", shard_bytes=0)
    with pytest.raises(NotSupported, match="whole blocks"):
        synth(presets.load("tiny-v3.1"), tmp_path / "a", fused=True)
    with pytest.raises(NotEnough, match="space"):
        synth(presets.load("kimi-k2"), tmp_path / "a")


def test_tokenizer(tiny):
    for directory in tiny.values():
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        text = "héllo wörld 漢字\n\t\0"
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode("a<|eos|>").ids[-1] == 1
        assert tokenizer.decode([1]) == ""


def test_tokenizer_with_high_special_ids(tmp_path):
    config = replace(CONFIG, vocab_size=1000, bos_token_id=900, eos_token_ids=(901, 902), pad_token_id=901)
    tokenizer = Tokenizer.from_file(str(synth(config, tmp_path / "a") / "tokenizer.json"))
    assert tokenizer.token_to_id("<|bos|>") == 900
    assert tokenizer.token_to_id("<|eos1|>") == 902
    assert max(tokenizer.encode("any text ÿ").ids) < 256


def test_no_tokenizer_where_bytes_do_not_fit(tmp_path):
    checkpoint = Checkpoint.open(synth(replace(CONFIG, vocab_size=64), tmp_path / "a"))
    assert "tokenizer.json" not in {file.name for file in checkpoint.tokenizer_files}


def test_router_bias_is_exact(tiny):
    weights = audit(Checkpoint.open(tiny["tiny-v3"])).weights
    bias = weights["model.layers.1.mlp.gate.e_score_correction_bias"].data.read()
    assert bias.dtype == np.float32
    assert 0.01 < bias.std() < 0.2
    assert not np.array_equal(decode(bias.astype(ml_dtypes.bfloat16)), bias)
