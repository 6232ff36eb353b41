"""A wrong epsilon, and a body that is not what its node's attributes say, are found though no number shows them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from damaged import Damaged

from v4export import api
from v4export.graphs.export import PORTABLE
from v4export.package.bundle import MANIFEST
from v4export.plain import to_json
from v4export.verify.bodies import body_faults
from v4export.verify.norms import norm_faults


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp8", marks=pytest.mark.slow)])
def test_sound_bodies(tiny_bundle, precision):
    assert list(body_faults(ir.load(tiny_bundle(precision).folder / PORTABLE))) == []


def wrong_attribute(damaged: Damaged) -> None:
    assert damaged.set_attribute("MoeRoute", "scale", 1.0, layer=2)


def wrong_body(damaged: Damaged) -> None:
    (body,) = (f for f in damaged.model.functions if f.name == "MoeRoute")
    next(node for node in body.node if node.op_type == "Sigmoid").op_type = "Tanh"


@pytest.mark.parametrize(("damage", "layers"), [(wrong_attribute, [2]), (wrong_body, [1, 2])])
def test_wrong_ones_are_named(tiny_bundle, tmp_path, damage, layers):
    damaged = Damaged(tiny_bundle("fp32").folder, tmp_path / "damaged")
    damage(damaged)
    damaged.save()
    found = list(body_faults(ir.load(damaged.folder / PORTABLE)))
    assert [int(line.split(".")[1]) for line in found] == layers
    assert all("the body of MoeRoute is not what the node's attributes say" in line for line in found)


@pytest.mark.slow
def test_verify_fails_unless_another_version_wrote_them(tiny_bundle, tmp_path):
    damaged = Damaged(tiny_bundle("fp32").folder, tmp_path / "damaged")
    wrong_attribute(damaged)
    damaged.save()
    found = api.verify(damaged.folder, decode=0)
    bad = [boundary for boundary in found.boundaries if not boundary.ok]
    assert [boundary.name for boundary in bad] == ["weights"] and "MoeRoute" in bad[0].notes[0]
    manifest = dict(damaged.bundle().manifest)
    manifest["versions"] = manifest["versions"] | {"v4export": "0.0"}
    (damaged.folder / MANIFEST).write_text(to_json(manifest))
    assert api.verify(damaged.folder, decode=0).passed


def test_epsilons(tiny_bundle, tmp_path):
    bundle = tiny_bundle("bf16")
    assert list(norm_faults(ir.load(bundle.folder / PORTABLE), bundle.config)) == []
    damaged = Damaged(bundle.folder, tmp_path / "damaged")
    node = next(n for n in damaged.nodes("RMSNormalization") if "layers.2." in n.name)
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3
    damaged.save()
    (line,) = norm_faults(ir.load(damaged.folder / PORTABLE), bundle.config)
    assert line.startswith(f"{node.name}: epsilon is 0.001, and should be ")
