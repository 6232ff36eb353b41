"""DeepSeek-V4's stored names, FP4 experts, and what must not be taken for them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from v4export import presets
from v4export.checkpoint.aliases import canonical, native
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.names import SCALE, expected
from v4export.errors import BadInput

V4, FP4 = "tiny-v4", "tiny-v4-fp4"
EXPERT = "layers.2.ffn.experts.3.w3"
UP = "model.layers.2.mlp.experts.3.up_proj.weight"


def test_every_name_has_another_and_back():
    for one in expected(presets.load(V4)).values():
        assert native(one.name) != one.name
        assert canonical(native(one.name)) == one.name == canonical(one.name)
        if one.role in ("linear", "expert"):
            assert native(one.name + SCALE) == native(one.name).removesuffix("weight") + "scale"
            assert canonical(native(one.name + SCALE)) == one.name + SCALE == canonical(one.name + SCALE)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("layers.7.attn.wq_a.scale", "model.layers.7.self_attn.q_a_proj.weight_scale_inv"),
        ("model.layers.7.attn.wq_a.weight_scale_inv", "model.layers.7.self_attn.q_a_proj.weight_scale_inv"),
        ("layers.17.ffn.experts.113.w2.scale", "model.layers.17.mlp.experts.113.down_proj.weight_scale_inv"),
        ("layers.0.ffn.shared_experts.w2.weight", "model.layers.0.mlp.shared_experts.down_proj.weight"),
        ("layers.2.attn.indexer.compressor.ape", "model.layers.2.self_attn.compressor.indexer.position_bias"),
        ("model.layers.2.attn.norm.weight", "model.layers.2.self_attn.kv_norm.weight"),
        # Names that are the vocabulary's, or nobody's.
        ("model.layers.2.attn_hc.scale", "model.layers.2.attn_hc.scale"),
        ("model.hc_head.hc_scale", "model.hc_head.hc_scale"),
        ("model.norm.weight", "model.norm.weight"),
        ("layers.2.attn_norm.scale", "model.layers.2.input_layernorm.weight_scale_inv"),
        ("layers.2.attn.attn_sink.scale", "layers.2.attn.attn_sink.scale"),
        ("mtp.0.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"),
        ("layers.2.attn.wo.weight", "layers.2.attn.wo.weight"),
    ],
)
def test_names(stored, name):
    assert canonical(stored) == name


def test_two_names_for_one_tensor(copy):
    damaged = copy(V4)
    damaged.arrays["model.layers.1.self_attn.sinks"] = damaged.arrays["layers.1.attn.attn_sink"]
    with pytest.raises(
        BadInput, match=r"two names\n.*model\.layers\.1\.self_attn\.sinks is .*layers\.1\.attn\.attn_sink"
    ):
        damaged.save()


def test_other_families_keep_their_names(copy):
    damaged = copy("tiny-v3")
    damaged.arrays["embed.weight"] = damaged.arrays.pop("model.embed_tokens.weight")
    with pytest.raises(BadInput, match=r"not part of the model: embed\.weight"):
        audit(damaged.save())


def test_prediction_stages_are_skipped(copy):
    damaged = copy(V4)
    extra = ["mtp.0.attn.wq_a.weight", "mtp.2.markov_head.markov_w1.weight", "mtp.0.hc_head_fn"]
    damaged.arrays |= {name: np.ones((2, 2), ml_dtypes.bfloat16) for name in extra}
    damaged.configure(num_nextn_predict_layers=0)
    account = audit(damaged.save())
    assert account.skipped == dict.fromkeys(extra, "prediction stage (MTP or DSpark), used for drafting only")


def change(name, **how):
    def edit(arrays):
        for key, function in how.items():
            arrays[f"{name}.{key}"] = function(arrays[f"{name}.{key}"])

    return edit


def first(name, value):
    def edit(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[:1] = value

    return edit


@pytest.mark.parametrize(
    ("preset", "edit", "match"),
    [
        (V4, lambda a: a.pop("layers.1.attn.attn_sink"), r"1 missing: model\.layers\.1\.self_attn\.sinks"),
        (V4, first("hc_head_fn", np.nan), r"NaN or infinity\n.*hc_head\.hc_fn \(stored as hc_head_fn\)"),
        (V4, first("layers.0.ffn.gate.tid2eid", 8), "0 to 8, experts are 0 to 7"),
        (V4, first("layers.0.ffn.gate.tid2eid", -1), "-1 to 7, experts are 0 to 7"),
        (V4, change("layers.0.ffn.gate", tid2eid=lambda a: a.astype(np.float32)), "expected I64 or I32, found F32"),
        (
            V4,
            change(EXPERT, weight=lambda a: np.zeros((48, 48), np.int8)),
            r"up_proj\.weight \(stored as layers.*found I8 \(config\.json has no expert_dtype fp4\)",
        ),
        (FP4, change(EXPERT, weight=lambda a: a[:, 1:]), r"w3\.weight\): expected \[64, 48\], found \[64, 47\]"),
        (FP4, change(EXPERT, scale=lambda a: a[:, 1:]), r"w3\.scale\): expected \[64, 3\], found \[64, 2\]"),
        (FP4, change(EXPERT, scale=lambda a: a.astype(np.float32)), "expected F8_E8M0, found F32"),
        (FP4, lambda a: a.pop(EXPERT + ".scale"), "1 FP4 without their scale: .*up_proj"),
        (FP4, first(EXPERT + ".scale", np.nan), rf"NaN or infinity\n.*stored as {EXPERT}\.scale"),
        (
            FP4,
            change("layers.2.ffn.shared_experts.w1", weight=lambda a: np.zeros(a.shape, np.int8)),
            "expected BF16 or F16 or F32 or F8_E4M3, found I8",
        ),
        (FP4, lambda a: a.update({"layers.1.ffn.gate.bias": np.ones(8, np.float32)}), "stored as layers.1.ffn.gate"),
    ],
)  # fmt: skip
def test_bad_checkpoint(copy, preset, edit, match):
    damaged = copy(preset)
    edit(damaged.arrays)
    with pytest.raises(BadInput, match=match):
        audit(damaged.save())


def test_a_byte_for_nan_is_a_multiplier_like_no_other(copy):
    damaged = copy(FP4)
    scale = damaged.arrays[EXPERT + ".scale"] = damaged.arrays[EXPERT + ".scale"].copy()
    scale.view(np.uint8)[0] = [0, 252, 127]
    weight = audit(damaged.save()).weights[UP]
    assert np.abs(weight.decode()[0, :32]).max() <= 6 * 2.0**-127
    scale.view(np.uint8)[-1, -1] = 255
    with pytest.raises(BadInput, match="NaN"):
        audit(damaged.save())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_bytes_may_have_a_sign(copy, dtype):
    damaged = copy(FP4)
    before = audit(damaged.save()).weights[UP]
    damaged.arrays[EXPERT + ".weight"] = damaged.arrays[EXPERT + ".weight"].view(dtype)
    after = audit(damaged.save()).weights[UP]
    assert after.packed and after.shape == (64, 96)
    np.testing.assert_array_equal(after.decode(), before.decode())


def test_experts_that_are_stored_otherwise(copy):
    """Where the configuration says FP4, each tensor's own dtype still decides."""
    damaged = copy(FP4)
    values = audit(damaged.save()).weights[UP].decode()
    damaged.arrays[EXPERT + ".weight"] = values.astype(ml_dtypes.bfloat16)
    del damaged.arrays[EXPERT + ".scale"]
    damaged.arrays["layers.1.ffn.experts.0.w1.weight"] = np.full((64, 96), 2, ml_dtypes.float8_e4m3fn)
    damaged.arrays["layers.1.ffn.experts.0.w1.scale"] = np.full((1, 1), 4, ml_dtypes.float8_e8m0fnu)
    weights = audit(damaged.save()).weights
    assert not weights[UP].packed
    np.testing.assert_array_equal(weights[UP].decode(), values)
    assert (weights["model.layers.1.mlp.experts.0.gate_proj.weight"].decode() == 8).all()


def test_hash_table_of_short_integers(copy):
    damaged = copy(V4)
    name = "layers.0.ffn.gate.tid2eid"
    damaged.arrays[name] = damaged.arrays[name].astype(np.int32)
    weight = audit(damaged.save()).weights["model.layers.0.mlp.gate.tid2eid"]
    assert weight.decode().dtype == np.int64
    np.testing.assert_array_equal(weight.decode(), damaged.arrays[name])


def test_names_do_not_change_the_hash(tiny):
    """The header's bytes are hashed, whatever its tensors are called afterwards."""
    checkpoint = Checkpoint.open(tiny[V4])
    assert "model.norm.weight" in checkpoint.tensors
    assert checkpoint.tensors["model.norm.weight"].name == "norm.weight"
    assert checkpoint.header_hash == Checkpoint.open(tiny[V4]).header_hash != Checkpoint.open(tiny[FP4]).header_hash
