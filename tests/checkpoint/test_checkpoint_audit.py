from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors_files import write_safetensors

from v4export import presets
from v4export.checkpoint import scan
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.names import UNTHOUGHT, expected
from v4export.checkpoint.synth import synth
from v4export.checkpoint.tensor import DTYPES, read_header
from v4export.config import Fp8Blocks, Reasoning
from v4export.errors import BadInput, NotSupported

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
NORM = "model.norm.weight"
BF16 = ml_dtypes.bfloat16


@pytest.mark.parametrize("name", [name for name in presets.names() if name.startswith("tiny-")])
def test_tiny_presets_are_clean(tiny, name):
    checkpoint = Checkpoint.open(tiny[name])
    seen = []
    account = audit(checkpoint, advance=seen.append)
    assert list(account.weights) == list(expected(presets.load(name)))
    assert {*account.used, *account.merged, *account.skipped} == checkpoint.tensors.keys()
    assert not account.skipped
    assert sum(account.counts.values()) == len(checkpoint.tensors)
    looked_up = [w for w in account.weights.values() if w.role == "engram_table"]
    unread = sum(part.nbytes for w in looked_up for part in (w.data, w.scale) if part)
    assert sum(seen) == checkpoint.nbytes - unread
    for weight in account.weights.values():
        values = weight.decode()
        assert values.dtype == (np.int64 if weight.role == "hash_table" else np.float32)
        assert values.shape == weight.shape
        assert (weight.scale is not None) == (weight.data.dtype in ("F8_E4M3", "I8"))
        assert weight.packed == (weight.data.dtype == "I8")


def test_summary(copy):
    damaged = copy("tiny-v3")
    damaged.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    account = audit(damaged.save())
    used = len(account.used)
    reason = "rotary frequencies are computed from the configuration"
    assert account.summary() == f"{used} tensors used, 0 merged, 1 skipped (1 {reason})"


def test_prediction_layer_is_skipped_where_the_configuration_has_one(copy):
    damaged = copy("tiny-v3")
    damaged.arrays["model.layers.3.eh_proj.weight"] = np.ones((2, 2), BF16)
    with pytest.raises(BadInput, match=r"1 not part of the model: model\.layers\.3\.eh_proj"):
        audit(damaged.save())
    damaged.configure(num_nextn_predict_layers=1)
    assert audit(damaged.save()).counts["skipped"] == 1


def test_tied_head_is_skipped(copy):
    damaged = copy("tiny-v3")
    damaged.configure(tie_word_embeddings=True)
    assert audit(damaged.save()).skipped == {"lm_head.weight": "tied to the embedding"}


def set_item(name, value):
    return lambda arrays: arrays.update({name: value})


def drop(name):
    return lambda arrays: arrays.pop(name)


def poison(name, value, at=-1):
    def edit(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[at] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop("model.norm.weight"), "1 missing: model.norm.weight"),
        (drop(EXPERT), f"1 not part of the model: {EXPERT}_scale_inv\n  1 missing: {EXPERT}\n"),
        (set_item("what.is.this", np.ones(3, BF16)), "1 not part of the model: what.is.this"),
        (set_item(NORM, np.ones(159, BF16)), r"wrong shape: model.norm.weight: expected \[160\], found \[159\]"),
        (set_item(NORM, np.ones(160, np.int32)), "wrong dtype: model.norm.weight: expected BF16 or .*, found I32"),
        (set_item(NORM, np.ones(160, ml_dtypes.float8_e4m3fn)), "wrong dtype: model.norm.weight"),
        (drop(EXPERT + "_scale_inv"), f"1 FP8 without their scale: {EXPERT}"),
        (set_item(EXPERT, np.ones((48, 160), BF16)), f"1 not quantised and have a scale: {EXPERT} is BF16"),
        (set_item(EXPERT + "_scale_inv", np.ones((2, 2), np.float32)), r"scale_inv: expected \[1, 2\], found \[2, 2\]"),
        (set_item(EXPERT + "_scale_inv", np.ones((1, 2), np.float16)), "scale_inv: expected F32 or .*, found F16"),
        (poison("lm_head.weight", np.nan), "1 tensors hold NaN or infinity\n.*lm_head.weight"),
        (poison("lm_head.weight", -np.inf, 0), "NaN or infinity\n.*lm_head.weight"),
        (poison(EXPERT, np.nan), f"NaN or infinity\n.*{EXPERT}"),
        (poison(EXPERT + "_scale_inv", np.inf), f"NaN or infinity\n.*{EXPERT}_scale_inv"),
        (poison("model.layers.1.mlp.gate.e_score_correction_bias", np.nan), "NaN or infinity"),
    ],
)  # fmt: skip
def test_bad_checkpoint(copy, edit, match):
    damaged = copy()
    edit(damaged.arrays)
    with pytest.raises(BadInput, match=match):
        audit(damaged.save())


def thinking(name):
    reasoning = Reasoning(2, 3, kv_lora_rank=24, qk_nope_head_dim=16, v_head_dim=16, intermediate_size=80)
    return replace(presets.load(name), reasoning=reasoning)


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v3.1", "tiny-v4"])
def test_reasoning_layers(tmp_path, name):
    config = thinking(name)
    checkpoint = Checkpoint.open(synth(config, tmp_path / "hub"))
    assert checkpoint.config == config
    account = audit(checkpoint)
    assert list(account.weights) == list(expected(config)) and not account.skipped
    assert {*account.weights} - {*expected(presets.load(name))} == {n for n in account.weights if ".reasoning." in n}
    # Without a thought they are not needed; where the configuration has none, nobody knows what they are.
    silent = replace(config, reasoning=replace(config.reasoning, steps=0))
    thought = [n for n in checkpoint.tensors if n.startswith("model.reasoning.")]
    assert audit(replace(checkpoint, config=silent)).skipped == dict.fromkeys(thought, UNTHOUGHT)
    with pytest.raises(BadInput, match=rf"{len(thought)} not part of the model: model\.reasoning\."):
        audit(replace(checkpoint, config=replace(config, reasoning=None)))


TALK, THOUGHT = "model.reasoning.talk_head.2.bias", "model.reasoning.layers.1.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop(TALK), f"1 missing: {TALK}"),
        (drop("model.reasoning.end_embedding"), "1 missing: model.reasoning.end_embedding"),
        (set_item(TALK, np.ones(95, BF16)), rf"wrong shape: {TALK}: expected \[96\], found \[95\]"),
        (set_item(THOUGHT, np.ones((24, 128), BF16)), rf"{THOUGHT}: expected \[128, 24\], found \[24, 128\]"),
        (set_item("model.reasoning.talk_head.4.bias", np.ones(1, BF16)), "not part of the model: .*talk_head.4.bias"),
        (poison("model.reasoning.start_embedding", np.nan), "NaN or infinity\n.*start_embedding"),
    ],
)
def test_bad_reasoning_layers(tmp_path, edit, match):
    directory = synth(thinking("tiny-v3"), tmp_path / "hub")
    arrays = {tensor.name: tensor.read() for tensor in Checkpoint.open(directory).tensors.values()}
    edit(arrays)
    write_safetensors(directory / "model.safetensors", arrays)
    with pytest.raises(BadInput, match=match):
        audit(Checkpoint.open(directory))


def test_scan_can_be_left_out(copy):
    damaged = copy()
    poison("lm_head.weight", np.nan)(damaged.arrays)
    audit(damaged.save(), scan_values=False)


def test_only_the_first_few_are_named(copy):
    damaged = copy()
    damaged.arrays = {name: array for name, array in damaged.arrays.items() if ".experts." not in name}
    with pytest.raises(BadInput, match=r"48 missing: .*, \.\.\."):
        audit(damaged.save())


def test_fp8_without_quantization_config(copy):
    damaged = copy()
    damaged.configure(quantization_config=None)
    with pytest.raises(BadInput, match="no quantization_config"):
        audit(damaged.save())


@pytest.mark.parametrize("dtype", [np.float32, BF16, ml_dtypes.float8_e8m0fnu])
def test_scale_dtypes(copy, dtype):
    # The preset's scales are powers of two, which each of these types holds.
    damaged = copy()
    before = audit(damaged.save()).weights[EXPERT].decode()
    damaged.arrays = {n: a.astype(dtype) if n.endswith("_scale_inv") else a for n, a in damaged.arrays.items()}
    np.testing.assert_array_equal(audit(damaged.save()).weights[EXPERT].decode(), before)


@pytest.mark.parametrize("fp8", [None, Fp8Blocks(16, 32)])
def test_fused_experts_equal_one_by_one(tmp_path, fp8):
    config = replace(presets.load("tiny-v3"), fp8=fp8)
    whole = Checkpoint.open(synth(config, tmp_path / "fused", fused=True))
    fused, single = audit(whole), audit(Checkpoint.open(synth(config, tmp_path / "single")))
    assert "model.layers.1.mlp.experts.gate_up_proj" in fused.merged
    assert not any(".experts.0." in name for name in whole.tensors)
    assert fused.weights.keys() == single.weights.keys()
    for name, weight in single.weights.items():
        assert fused.weights[name].shape == weight.shape
        np.testing.assert_array_equal(fused.weights[name].decode(), weight.decode())


def test_fused_faults(tmp_path, copy):
    config = replace(presets.load("tiny-v3"), fp8=None)
    checkpoint = Checkpoint.open(synth(config, tmp_path / "fused", fused=True))
    damaged = copy("tiny-v3")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    damaged.arrays[name] = checkpoint.tensors[name].read()
    with pytest.raises(BadInput, match="32 stored twice"):
        audit(damaged.save())
    damaged.arrays = {n: a for n, a in damaged.arrays.items() if not n.startswith("model.layers.1.mlp.experts.")}
    damaged.arrays[name] = checkpoint.tensors[name].read()[:, 1:]
    with pytest.raises(BadInput) as error:
        audit(damaged.save())
    assert "expected [16, 96, 96], found [16, 95, 96]" in str(error.value)
    assert "16 missing: model.layers.1.mlp.experts.0.down_proj.weight" in str(error.value)


def test_fused_blocks_across_projections(copy):
    damaged = copy()
    damaged.arrays = {n: a for n, a in damaged.arrays.items() if not n.startswith("model.layers.1.mlp.experts.")}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    damaged.arrays[name] = np.zeros((8, 96, 160), ml_dtypes.float8_e4m3fn)
    damaged.arrays[name + "_scale_inv"] = np.ones((8, 1, 2), np.float32)
    with pytest.raises(NotSupported, match="one by one"):
        audit(damaged.save())


@pytest.mark.parametrize("spelling", sorted(scan.NOT_FINITE))
def test_scan_agrees_with_numpy_on_every_pattern(tmp_path, spelling):
    dtype = DTYPES[spelling]
    bits = min(8 * dtype.itemsize, 16)
    patterns = np.arange(1 << bits, dtype=f"u{dtype.itemsize}") << (8 * dtype.itemsize - bits)
    values = patterns.view(dtype)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(values.astype(np.float64))
    kind, mask, limit = scan.NOT_FINITE[spelling]
    np.testing.assert_array_equal((patterns & kind(mask)) < limit, finite)
    write_safetensors(tmp_path / "a.safetensors", {"good": values[finite], "bad": values})
    assert scan.not_finite(read_header(tmp_path / "a.safetensors")[1].values()) == ["bad"]


def test_scan_crosses_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "WINDOW", 16)
    values = np.ones((6, 9), np.float32)
    values[5, 8] = np.nan
    write_safetensors(tmp_path / "a.safetensors", {"odd": np.ones(3, np.int8), "x": values, "y": np.ones(5, BF16)})
    seen = []
    assert scan.not_finite(read_header(tmp_path / "a.safetensors")[1].values(), seen.append) == ["x"]
    assert sum(seen) == 3 + 6 * 9 * 4 + 10
