from __future__ import annotations

import struct
from collections import Counter

import pytest
from engine_graphs import fp4_linear, fp8_linear, linear, save

from v4export.engine.evidence import (
    NetworkFacts,
    PlanFacts,
    WeightFacts,
    prove_network,
    prove_plan,
    read_plan,
    read_weights,
)
from v4export.precision import PRECISIONS

FP8, FP32 = 64 << 20, 2 << 20


def plan(constants, size=100, header=100, targets=("sm89",)):
    return PlanFacts(size, header, "1.7.1.116", targets, constants)


def outcome(path, facts, weights, targets=("sm89",), precision="fp8"):
    stored = PRECISIONS[precision].stored
    return {proof.claim: proof.holds for proof in prove_plan(path, facts, stored, weights, targets, True)}


@pytest.mark.parametrize(
    ("constants", "holds"),
    [
        ({"fp8_e4m3": FP8, "float": FP32}, True),
        ({"fp8_e4m3": 2 * FP8, "float": 2 * FP32}, True),
        ({"bf16": 2 * FP8, "float": FP32}, False),
        ({"fp8_e4m3": FP8 // 2, "bf16": FP8, "float": FP32}, False),
        ({"fp8_e4m3": FP8, "bf16": 2 * FP8, "float": FP32}, False),
    ],
    ids=["kept", "listed once a profile", "widened", "half widened", "widened beside"],
)
def test_widened_weights_are_noticed(tmp_path, constants, holds):
    weights = WeightFacts({"fp8": FP8, "fp32": FP32}, {})
    assert outcome(tmp_path, plan(constants), weights)["weights are stored as fp8"] is holds


FP4 = 64 << 20
BLACKWELL = WeightFacts({"fp4": FP4, "fp8": FP4 // 8, "bf16": FP4 // 4}, {})


@pytest.mark.parametrize(
    ("constants", "fp4", "fp8"),
    [
        ({"fp4_e2m1": FP4, "fp8_e4m3": FP4 // 8, "bf16": FP4 // 4}, True, True),
        ({"fp4_e2m1": 2 * FP4, "fp8_e4m3": FP4 // 4, "bf16": FP4 // 2}, True, True),
        ({"fp8_e4m3": 2 * FP4 + FP4 // 8, "bf16": FP4 // 4}, False, True),
        ({"bf16": 4 * FP4 + FP4 // 4, "fp8_e4m3": FP4 // 8}, False, False),
        ({"fp4_e2m1": FP4 // 2, "fp8_e4m3": FP4 + FP4 // 8, "bf16": FP4 // 4}, False, True),
        ({"fp4_e2m1": FP4, "bf16": FP4 // 2}, False, False),
    ],
    ids=["kept", "listed once a profile", "widened to fp8", "widened", "half widened to fp8", "linears widened"],
)
def test_both_formats_of_mxfp4_are_looked_for(tmp_path, constants, fp4, fp8):
    found = outcome(tmp_path, plan(constants, targets=("sm120",)), BLACKWELL, ("sm120",), "mxfp4")
    assert (found["weights are stored as fp4"], found["weights are stored as fp8"]) == (fp4, fp8)


def test_bytes_of_packed_weights(tmp_path):
    weights = read_weights(save(fp4_linear(), tmp_path, external=True), ["fp4", "fp8"])
    assert weights.sizes == {"fp4": 256 * 512 // 2, "bf16": 256 * 512 // 32 * 2}
    ((row,),) = weights.samples["fp4"].values()
    assert len(row) == 256
    content = (tmp_path / "weights.bin").read_bytes()
    assert content.count(row) == 1 and content.index(row) % 256 == 0
    path = tmp_path / "plan"
    for text, holds in ((row, True), (row[::-1], False)):
        path.write_bytes(b"something" * 100 + text + b"else")
        assert outcome(path, read_plan(path), weights, precision="mxfp4") == {"weights are stored as fp4": holds}


def test_targets_and_length(tmp_path):
    found = outcome(tmp_path, plan({}, size=90, targets=("sm86",)), WeightFacts({}, {}))
    assert found == {"the plan is complete": False, "it is for the targets asked for": False}


@pytest.mark.parametrize("transposed", [False, True])
def test_without_a_listing_the_bytes_decide(tmp_path, transposed):
    weights = read_weights(save(fp8_linear(), tmp_path, external=True), ["fp8"])
    (row, column) = weights.samples["fp8"]["W"]
    path = tmp_path / "plan"
    path.write_bytes(b"something" * 100 + (column if transposed else row) + b"else")
    assert outcome(path, read_plan(path), weights) == {"weights are stored as fp8": True}
    path.write_bytes(b"something" * 100)
    assert outcome(path, read_plan(path), weights) == {"weights are stored as fp8": False}


def test_weights_of_a_file(tmp_path):
    facts = read_weights(save(linear("bf16"), tmp_path), ["bf16"])
    assert facts.sizes == {"bf16": 256 * 200 * 2} and len(facts.samples["bf16"]["W"][0]) == 256


def test_header(tmp_path):
    path = tmp_path / "plan"
    path.write_bytes(b"vtrt" + bytes(12) + struct.pack("<Q4BII", 64, 1, 7, 1, 116, 0, 8 | 16) + bytes(28))
    facts = read_plan(path)
    assert (facts.size, facts.header_size, facts.version, facts.targets) == (64, 64, "1.7.1.116", ("sm89", "sm120"))


BOTH = WeightFacts({"fp4": FP4, "fp8": FP4, "bf16": FP4}, {})


@pytest.mark.parametrize(
    ("precision", "facts", "holds"),
    [
        ("bf16", NetworkFacts(matrix=Counter(BF16=3, FLOAT=1)), True),
        ("bf16", NetworkFacts(matrix=Counter(FLOAT=4)), False),
        ("fp8", NetworkFacts(matrix=Counter(BF16=3)), False),
        ("fp8", NetworkFacts(matrix=Counter(BF16=3), dequantized=Counter(FP8=3)), True),
        ("fp8", NetworkFacts(dequantized=Counter(INT4=3)), False),
        ("mxfp4", NetworkFacts(matrix=Counter(BF16=3), dequantized=Counter(FP8=3, FP4=9)), True),
        ("mxfp4", NetworkFacts(matrix=Counter(BF16=3), dequantized=Counter(FP8=3)), False),
        ("mxfp4", NetworkFacts(matrix=Counter(BF16=3), dequantized=Counter(FP4=3)), False),
        ("int4", NetworkFacts(matrix=Counter(BF16=3), dequantized=Counter(FP4=3)), False),
        ("fp8-w8a8", NetworkFacts(dequantized=Counter(FP8=3)), False),
        ("fp8-w8a8", NetworkFacts(dequantized=Counter(FP8=3), layers=Counter(QUANTIZE=2)), True),
    ],
)
def test_network(precision, facts, holds):
    asked = PRECISIONS[precision]
    proofs = prove_network(asked.stored, BOTH, facts, asked.inputs)
    assert all(proof.holds for proof in proofs) is holds and proofs
