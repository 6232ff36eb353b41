"""Rows that tokens leave without passing a decoder are compared with those of the whole graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged import Damaged

from v4export.graphs.export import REMEMBERING
from v4export.precision import precision
from v4export.runtime.onnx import OnnxExecutor
from v4export.verify.remembering import remembered_rows


def no_norm_of_entries(damaged: Damaged) -> None:
    node = [n for n in damaged.nodes("RMSNormalization") if n.name.startswith("layers.5.")][-1]
    node.op_type = "Identity"
    del node.input[1:], node.attribute[:]


def no_scale_of_routers(damaged: Damaged) -> None:
    assert damaged.set_attribute("MoeRoute", "scale", 1.0)
    damaged.rebuild()


def rows(folder: Path, config, bodies: bool = False):
    how = precision("fp32", config)
    executor = OnnxExecutor(folder, config, how, max_seq_len=512, prepack=False, bodies=bodies)
    return remembered_rows(executor, config, how, list(range(3, 35)), 3 if bodies else 13)


@pytest.mark.slow
def test_remembered_rows(random_bundle, tmp_path):
    bundle = random_bundle("tiny-v4.1", "fp32")
    for bodies in (False, True):
        found = rows(bundle.folder, bundle.config, bodies)
        assert found.ok and found.max_abs == 0 and found.limit > 0
    for damage in (no_norm_of_entries, no_scale_of_routers):
        damaged = Damaged(bundle.folder, tmp_path / damage.__name__, REMEMBERING)
        damage(damaged)
        damaged.save()
        found = rows(damaged.folder, bundle.config)
        assert not found.ok and found.notes[-1].startswith("layer ")
