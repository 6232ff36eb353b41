"""Bundles: planted faults are caught by ``verify`` and named by ``bisect``; sound ones do not part at any precision."""

from __future__ import annotations

import onnx
import pytest
from damaged import Damaged
from mutations import KINDS, Site, faults
from planted import Sound

from v4export import api
from v4export.bisect import bundles
from v4export.bisect.feeds import decoder_inputs
from v4export.errors import BadInput, NumbersDiffer
from v4export.graphs.export import PORTABLE

#: Of the kinds of fault that a graph of tiny-v3 can have; all of them, over all presets, are in docs/bisect.md.
SAMPLE = 25


def no_shared_expert(damaged: Damaged) -> None:
    """One node hands on its input in place of a sum."""
    node = next(n for n in damaged.model.graph.node if n.op_type == "Add" and "layers.1.moe_experts" in n.input)
    node.op_type = "Identity"
    del node.input[1]


@pytest.mark.slow
def test_planted_faults_are_caught_and_named(tiny_bundle, tmp_path):
    sound = Sound(tiny_bundle("fp32"))
    chosen = faults(sound.site, SAMPLE, seed=7)
    found = [sound.try_fault(fault, tmp_path / "copy") for fault in chosen]
    assert len(found) == SAMPLE and len(KINDS) > 2 * SAMPLE
    assert [(o.kind, o.place) for o in found if o.verdict == "missed"] == []
    named = [o for o in found if o.verdict == "named"]
    assert [(o.kind, o.place, o.named) for o in found if o.verdict == "not named"] == []
    assert len(named) >= 0.9 * SAMPLE


@pytest.mark.slow
def test_a_bundle_and_a_fresh_export(tiny_bundle, tmp_path):
    damaged = Damaged(tiny_bundle("bf16").folder, tmp_path / "damaged")
    no_shared_expert(damaged)
    damaged.save()
    found = api.bisect(damaged.folder, out=tmp_path / "case")
    assert found.boundary == "layer 1 routed" and found.node.graph == PORTABLE and found.node.op_type == "Identity"
    assert found.node.causes[0] == "it is Identity, the reference has Add"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".bisect")]
    with pytest.raises(NumbersDiffer):
        api.replay(tmp_path / "case").check()


@pytest.mark.slow
def test_a_fault_of_the_exporter_itself_has_a_layer_and_no_node(tiny_bundle, tmp_path):
    damaged = Damaged(tiny_bundle("fp32").folder, tmp_path / "damaged")
    no_shared_expert(damaged)
    damaged.save()
    sound = Sound(damaged.bundle())
    found = bundles.with_checkpoint(
        damaged.bundle(), bundles.Asked(), bundles.Stages(quiet=True), sound=(damaged.bundle(), sound.feeds)
    )
    assert found.boundary == "layer 1 routed" and found.node is None and "no node differs" in found.notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "against"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_sound_bundles_do_not_part(tiny_bundle, precision, against):
    found = api.bisect(tiny_bundle(precision).folder, against=tiny_bundle(against).folder)
    assert not found.parted, found.text()


@pytest.mark.slow
def test_nodes_that_are_not_alike_are_told_though_no_number_shows_it(tiny_bundle, tmp_path):
    damaged = Damaged(tiny_bundle("fp32").folder, tmp_path / "damaged")
    assert damaged.set_attribute("MoeRoute", "scale", 1.0, layer=2)
    damaged.save()
    found = api.bisect(damaged.folder, against=tiny_bundle("fp32").folder)
    assert not found.parted and found.notes[0].startswith("2 nodes are not alike")  # of the graph and of its copy
    assert "scale is 1.0, the reference has 2.5" in found.notes[1]
    assert api.bisect(damaged.folder).node.causes == ("scale is 1.0, the reference has 2.5",)


@pytest.mark.slow
def test_a_fault_shows_through_two_precisions(tiny_bundle, tmp_path):
    damaged = Damaged(tiny_bundle("bf16").folder, tmp_path / "damaged")
    no_shared_expert(damaged)
    damaged.save()
    found = api.bisect(damaged.folder, against=tiny_bundle("fp32").folder, prompt="def merge(left, right):")
    assert found.boundary == "layer 1" and found.node.op_type == "Identity"


@pytest.mark.slow
def test_a_graph_of_the_state_contract_needs_no_bundle(tiny_bundle, tmp_path):
    pytest.importorskip("polygraphy")
    damaged = Damaged(tiny_bundle("fp32").folder, tmp_path / "damaged")
    no_shared_expert(damaged)
    damaged.save()
    found = api.bisect(damaged.folder / PORTABLE, against=tiny_bundle("fp32").folder / PORTABLE)
    assert found.node.op_type == "Identity" and found.boundary == "layer 1"


def test_inputs_of_the_state_contract(tiny_bundle):
    model = onnx.load(tiny_bundle("fp32").folder / PORTABLE, load_external_data=False)
    inputs = decoder_inputs(model, seed=3)
    assert inputs.keys() == {value.name for value in model.graph.input}
    assert inputs["position"].tolist() == [inputs["state.0.latent"].shape[1]]
    model.graph.input[3].type.tensor_type.shape.dim[1].dim_param = "unheard of"
    with pytest.raises(BadInput, match=r"state\.0\.latent is not of the state contract"):
        decoder_inputs(model, seed=3)


def test_every_kind_of_fault_is_planted_somewhere(tiny_bundle):
    model = onnx.load(tiny_bundle("fp32").folder / PORTABLE, load_external_data=False)
    kinds = [fault.kind for fault in faults(Site.of(model), len(KINDS), seed=0)]
    assert len(kinds) > 35 and len(set(kinds)) == len(kinds)


@pytest.mark.slow
def test_bundles_of_different_models_are_refused(tiny_bundle, tmp_path):
    other = tmp_path / "other"
    api.export(tiny_bundle("fp32").source, other, precision="fp32", layers=range(2), max_seq_len=64)
    with pytest.raises(BadInput, match="different models"):
        api.bisect(other, against=tiny_bundle("fp32").folder)
