"""What was repacked for onnxruntime's kernels is compared with what it should be made of, to the last expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from v4export.checkpoint.audit import Weight, audit
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.tensor import read_header
from v4export.errors import NumbersDiffer
from v4export.graphs.export import LOWERED_FOR_CPU, PORTABLE
from v4export.package.bundle import Bundle
from v4export.verify.references import References, check_references
from v4export.verify.verification import verify_bundle

pytestmark = pytest.mark.slow
GRAPHS = (PORTABLE, LOWERED_FOR_CPU)
STACK = "model.layers.2.mlp.experts.gate_up_proj.weight"
FILE = "cpu-00001.safetensors"


@pytest.fixture(scope="module")
def weights(trained_checkpoint: Path) -> dict[str, Weight]:
    return audit(Checkpoint.open(trained_checkpoint), scan_values=False).weights


@pytest.fixture
def bundle(exported: Callable[[str], Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("int4").folder, tmp_path / "bundle"))


def found(bundle: Path, weights: dict[str, Weight]) -> References:
    return check_references(
        bundle, {name: list(weights.values()) for name in GRAPHS}, weights, Bundle.open(bundle).precision
    )


def change(bundle: Path, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Change the bytes of a tensor, one row for each index of its first axis."""
    file = bundle / "weights" / FILE
    tensor = read_header(file)[1][name]
    data = np.memmap(file, np.uint8, "r+", tensor.offset, tensor.nbytes)
    edit(data.reshape(tensor.shape[0], -1))
    data.flush()


def test_a_sound_bundle(bundle: Path, weights: dict[str, Weight]) -> None:
    result = found(bundle, weights)
    stored = read_header(bundle / "weights" / FILE)[1]
    facts = Bundle.open(bundle).manifest
    assert not result.wrong
    assert result.converted >= len(stored) > 0
    assert facts["graphs"]["cpu_bytes"] == sum(t.nbytes for t in stored.values())
    assert "sha256" in facts["files"][f"weights/{FILE}"]


def test_a_bit_of_the_last_expert(bundle: Path, weights: dict[str, Weight]) -> None:
    def flip(rows: np.ndarray) -> None:
        rows[-1, -1] ^= 0x10

    change(bundle, f"{STACK}.unsigned", flip)
    assert any(line.startswith(f"{STACK}.unsigned: ") for line in found(bundle, weights).wrong)


@pytest.mark.parametrize("kind", [".unsigned", "_scale_inv.float32"])
def test_swapped_experts(bundle: Path, weights: dict[str, Weight], kind: str) -> None:
    def swap(rows: np.ndarray) -> None:
        rows[[-2, -1]] = rows[[-1, -2]]

    change(bundle, STACK + kind, swap)
    assert any(line.startswith(f"{STACK}{kind}: ") for line in found(bundle, weights).wrong)


def test_swapped_names(bundle: Path, weights: dict[str, Weight]) -> None:
    """Matrices of the same shape, each said to lie where the other does."""
    file = bundle / "weights" / FILE
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    one, two = (f"model.layers.{layer}.self_attn.o_proj.weight.unsigned" for layer in (0, 3))
    header[one], header[two] = header[two], header[one]
    file.write_bytes(data[:8] + json.dumps(header).encode().ljust(size) + data[8 + size :])
    wrong = found(bundle, weights).wrong
    assert {line.split(":")[0] for line in wrong} >= {one, two, LOWERED_FOR_CPU}


def test_a_graph_that_reads_another_place(bundle: Path, weights: dict[str, Weight]) -> None:
    model = onnx.load(bundle / LOWERED_FOR_CPU, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == f"{STACK}.unsigned")
    offset = next(e for e in tensor.external_data if e.key == "offset")
    offset.value = str(int(offset.value) + 16)
    (bundle / LOWERED_FOR_CPU).write_bytes(model.SerializeToString())
    assert any(f"{STACK}.unsigned is read from" in line for line in found(bundle, weights).wrong)


def test_a_tensor_of_no_weight(bundle: Path, weights: dict[str, Weight]) -> None:
    file = bundle / "weights" / FILE
    own, other = (b"layers.3.self_attn.%s_proj.weight.unsigned" % letter for letter in (b"o", b"x"))
    file.write_bytes(file.read_bytes().replace(own, other))
    assert any("x_proj.weight.unsigned: the checkpoint has nothing" in line for line in found(bundle, weights).wrong)


def test_the_verdict(bundle: Path, weights: dict[str, Weight]) -> None:
    def swap(rows: np.ndarray) -> None:
        rows[[-2, -1]] = rows[[-1, -2]]

    change(bundle, f"{STACK}.unsigned", swap)
    verification = verify_bundle(Bundle.open(bundle), weights, decode=1, prompts=[[1, 2, 3]])
    with pytest.raises(NumbersDiffer, match="weights"):
        verification.check()
