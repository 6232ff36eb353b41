"""Multi-token prediction layers in checkpoints: skipped, or used to draft, under whatever names they have."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from v4export import presets
from v4export.checkpoint.aliases import native
from v4export.checkpoint.audit import audit
from v4export.checkpoint.count import parameter_counts
from v4export.checkpoint.names import MTP, MTP_COPY, V4_MTP, V4_STAGE, expected
from v4export.checkpoint.synth import synth
from v4export.config.chosen import Chosen
from v4export.errors import BadInput, NotSupported
from v4export.opened import open_checkpoint

#: How the layer's tensors are called in a file, and why they are left out.
MODELS = {
    "tiny-v3": ("model.layers.3.", MTP),
    "tiny-v3.2": ("model.layers.3.", MTP),
    "tiny-v4": ("mtp.0.", V4_MTP),
    "tiny-v4-fp4": ("mtp.0.", V4_MTP),
}
DRAFT = Chosen(draft=True)


def config_of(name):
    return replace(presets.load(name), num_mtp_layers=1, drafts=True)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    return {name: synth(config_of(name), folder / name) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_they_are_used_where_that_is_asked_for(hubs, name):
    prefix, reason = MODELS[name]
    stored = {key for key in stored_names(hubs[name]) if key.startswith(prefix)}
    used, skipped = (audit(open_checkpoint(hubs[name], how)) for how in (DRAFT, Chosen()))
    assert not used.skipped and {w.data.name for w in used.weights.values()} >= {n for n in stored if "scale" not in n}
    assert skipped.skipped == dict.fromkeys(stored, reason) and "--draft" in reason


def stored_names(folder):
    return {tensor.name for tensor in open_checkpoint(folder).tensors.values()}


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v4"])
def test_they_do_not_count(name):
    config = config_of(name)
    assert parameter_counts(config) == parameter_counts(replace(config, drafts=False))


def test_what_the_layer_of_v4_is_called(hubs):
    stored = stored_names(hubs["tiny-v4"])
    assert {
        "mtp.0.attn.wq_a.weight", "mtp.0.attn.attn_sink", "mtp.0.hc_attn_fn", "mtp.0.ffn.gate.bias",
        "mtp.0.ffn.experts.7.w2.weight", "mtp.0.e_proj.weight", "mtp.0.h_proj.weight", "mtp.0.enorm.weight",
        "mtp.0.hnorm.weight", "mtp.0.norm.weight", "mtp.0.hc_head_fn", "mtp.0.hc_head_base", "mtp.0.hc_head_scale",
    } <= stored  # fmt: skip
    assert not any(key.startswith("mtp.0.attn.compressor") or "tid2eid" in key for key in stored if "mtp" in key)
    layer = config_of("tiny-v4").num_layers
    assert native(f"model.layers.{layer}.shared_head.norm.weight", layer) == "mtp.0.norm.weight"
    assert native(f"model.layers.{layer - 1}.input_layernorm.weight", layer) == f"layers.{layer - 1}.attn_norm.weight"


def changed(folder, copy, edit, **keys):
    """A checkpoint with other tensors, and other keys in its config.json."""
    shutil.copytree(folder, copy)
    arrays = load_file(copy / "model.safetensors")
    edit(arrays)
    save_file(arrays, copy / "model.safetensors")
    config = json.loads((copy / "config.json").read_text()) | keys
    (copy / "config.json").write_text(json.dumps(config))
    return copy


ONE = np.ones((2, 2), ml_dtypes.bfloat16)


def test_copies_of_the_model_s_own_are_skipped(hubs, tmp_path):
    copies = ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"]
    folder = changed(hubs["tiny-v3"], tmp_path / "copy", lambda a: a.update(dict.fromkeys(copies, ONE)))
    assert audit(open_checkpoint(folder, DRAFT)).skipped == dict.fromkeys(copies, MTP_COPY)


def test_only_the_first_drafts(hubs, tmp_path):
    second = {"model.layers.4.enorm.weight": ONE}
    folder = changed(hubs["tiny-v3"], tmp_path / "copy", lambda a: a.update(second), num_nextn_predict_layers=2)
    assert audit(open_checkpoint(folder, DRAFT)).skipped == dict.fromkeys(second, MTP)
    second = {"mtp.1.enorm.weight": ONE}
    folder = changed(hubs["tiny-v4"], tmp_path / "v4", lambda a: a.update(second))
    assert audit(open_checkpoint(folder, DRAFT)).skipped == dict.fromkeys(second, V4_MTP)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("tiny-v3", lambda a: a.pop("model.layers.3.eh_proj.weight"), r"1 missing: model\.layers\.3\.eh_proj"),
        ("tiny-v4", lambda a: a.pop("mtp.0.hc_head_fn"), r"1 missing: model\.layers\.\d\.hc_head\.hc_fn"),
        ("tiny-v3", lambda a: a.update({"model.layers.3.new": ONE}), r"1 not part of the model: model\.layers\.3\.new"),
        ("tiny-v4", lambda a: a.update({"mtp.0.new": ONE}), r"1 not part of the model: .*mtp\.0\.new"),
        ("tiny-v3", lambda a: a.update({"model.layers.3.enorm.weight": ONE}), "1 of the wrong shape"),
    ],
)
def test_what_is_wrong_with_a_layer_is_found(hubs, tmp_path, name, edit, message):
    folder = changed(hubs[name], tmp_path / "copy", edit)
    with pytest.raises(BadInput, match=message):
        audit(open_checkpoint(folder, DRAFT))


def test_drafters_of_later_releases_are_left_out(hubs, tmp_path):
    own = {"mtp.0.main_proj.weight": ONE, "mtp.2.markov_head.markov_w1.weight": ONE, "mtp.2.confidence_head.proj": ONE}
    folder = changed(hubs["tiny-v4"], tmp_path / "copy", lambda a: a.update(own))
    with pytest.raises(NotSupported, match="drafts with DSpark"):
        audit(open_checkpoint(folder, DRAFT))
    skipped = audit(open_checkpoint(folder)).skipped
    assert {skipped[name] for name in own} == {V4_STAGE}


def test_a_checkpoint_without_the_layer_that_it_speaks_of(tmp_path):
    folder = synth(replace(config_of("tiny-v3"), drafts=False), tmp_path / "hub")
    with pytest.raises(BadInput, match=r"no multi-token prediction layer, though(.|\n)*model\.layers\.3\."):
        audit(open_checkpoint(folder, DRAFT))


def test_layers_cannot_be_left_out_before_it(hubs):
    with pytest.raises(BadInput, match="goes on from the last layer"):
        open_checkpoint(hubs["tiny-v3"], Chosen(layers=2, draft=True))


def test_every_tensor_has_one_place():
    for name in MODELS:
        config = config_of(name)
        more = expected(config).keys() - expected(replace(config, drafts=False)).keys()
        assert more and all(one.startswith(f"model.layers.{config.num_layers}.") for one in more)
