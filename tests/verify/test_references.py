"""Weight references are checked whether or not a prompt reaches them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from v4export import api
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.errors import BadInput
from v4export.graphs.export import LOWERED_FOR_CPU, PORTABLE
from v4export.package.bundle import Bundle
from v4export.verify.references import References, check_references
from v4export.verify.regions import _nodes, is_region

pytestmark = pytest.mark.slow
GRAPHS = (PORTABLE, LOWERED_FOR_CPU)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("references")
    api.synth("tiny-v3", folder / "model")
    api.export(folder / "model", folder / "bundle", precision="fp8")
    return folder / "model", folder / "bundle"


@pytest.fixture
def bundle(exported: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[1], tmp_path / "bundle"))


def found(model: Path, bundle: Path) -> References:
    weights = audit(Checkpoint.open(model)).weights
    graphs = {name: list(weights.values()) for name in GRAPHS}
    return check_references(bundle, graphs, weights, Bundle.open(bundle).precision)


def edit(graph: Path, change: Callable[[dict[str, onnx.TensorProto]], None]) -> None:
    model = onnx.load(graph, load_external_data=False)
    change({t.name: t for t in model.graph.initializer})
    graph.write_bytes(model.SerializeToString())


def entry(tensor: onnx.TensorProto, key: str) -> onnx.StringStringEntryProto:
    return next(e for e in tensor.external_data if e.key == key)


def test_a_sound_bundle_has_every_reference_checked(exported: tuple[Path, Path]) -> None:
    model, bundle = exported
    result = found(model, bundle)
    needed = len(audit(Checkpoint.open(model)).weights)
    assert not result.wrong
    assert result.count >= 2 * needed
    assert result.converted > 0


def swap_experts(tensors: dict[str, onnx.TensorProto]) -> None:
    a, b = (entry(tensors[f"model.layers.2.mlp.experts.{e}.up_proj.weight"], "offset") for e in (14, 15))
    a.value, b.value = b.value, a.value


def move_one(tensors: dict[str, onnx.TensorProto]) -> None:
    offset = entry(tensors["model.norm.weight"], "offset")
    offset.value = str(int(offset.value) + 2)


def shorten(tensors: dict[str, onnx.TensorProto]) -> None:
    length = entry(tensors["lm_head.weight"], "length")
    length.value = str(int(length.value) - 2)


def reshape(tensors: dict[str, onnx.TensorProto]) -> None:
    tensors["lm_head.weight"].dims[0] += 1


def read_a_region_from_elsewhere(tensors: dict[str, onnx.TensorProto]) -> None:
    for name, tensor in tensors.items():
        if is_region(name):
            offset = entry(tensor, "offset")
            offset.value = str(int(offset.value) + 2)


def rename(tensors: dict[str, onnx.TensorProto]) -> None:
    tensors["model.norm.weight"].name = "model.norm.bias"


def test_a_region_that_begins_elsewhere_is_named(exported: tuple[Path, Path], bundle: Path) -> None:
    edit(bundle / LOWERED_FOR_CPU, read_a_region_from_elsewhere)
    assert any("experts.0.gate_proj.weight is read at" in line for line in found(exported[0], bundle).wrong)


def test_swapped_experts_of_the_portable_graph_are_named(exported: tuple[Path, Path], bundle: Path) -> None:
    edit(bundle / PORTABLE, swap_experts)
    wrong = found(exported[0], bundle).wrong
    assert any(line.startswith(f"{PORTABLE}: ") and "experts.14.up_proj.weight is read from" in line for line in wrong)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (move_one, "model.norm.weight is read from"),
        (shorten, "is read as"),
        (reshape, "has shape"),
        (rename, "is no tensor of the checkpoint"),
    ],
)
def test_a_wrong_reference_is_named(
    exported: tuple[Path, Path],
    bundle: Path,
    graph: str,
    change: Callable[[dict[str, onnx.TensorProto]], None],
    says: str,
) -> None:
    edit(bundle / graph, change)
    wrong = found(exported[0], bundle).wrong
    assert any(line.startswith(f"{graph}: ") and says in line for line in wrong), wrong


def test_experts_read_by_number_are_where_the_table_says(exported: tuple[Path, Path], bundle: Path) -> None:
    model = onnx.load(bundle / LOWERED_FOR_CPU, load_external_data=False)
    regions = [t.name for t in model.graph.initializer if is_region(t.name)]
    assert regions
    count = 0
    for node in _nodes(model.graph):
        table = next((a.t for a in node.attribute if a.name == "value"), None) if node.op_type == "Constant" else None
        # Rows of 16 experts' three matrices, or of what is behind them.
        if table is not None and table.data_type == onnx.TensorProto.INT64 and list(table.dims) == [48]:
            rows = numpy_helper.to_array(table).copy()
            rows[[14, 15]] = rows[[15, 14]]
            table.CopyFrom(numpy_helper.from_array(rows))
            count += 1
    assert count
    (bundle / LOWERED_FOR_CPU).write_bytes(model.SerializeToString())
    wrong = found(exported[0], bundle).wrong
    assert any("experts.14.gate_proj.weight is read at" in line for line in wrong), wrong


def test_converted_bytes_are_compared(exported: tuple[Path, Path], bundle: Path) -> None:
    file = next((bundle / "weights").glob("converted-*"))
    data = bytearray(file.read_bytes())
    data[-5000] ^= 0x11
    file.write_bytes(data)
    assert any("are not the checkpoint's" in line for line in found(exported[0], bundle).wrong)


def test_verify_refuses_a_bundle_whose_files_changed(exported: tuple[Path, Path], bundle: Path) -> None:
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="has changed since it was built"):
        api.verify(bundle, checkpoint=exported[0])
