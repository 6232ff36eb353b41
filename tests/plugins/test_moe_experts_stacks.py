"""Stacks of experts that are too large for one tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from engine_of import builds
from test_moe_experts import E2M1, body, eager, node_model, operands

from v4export.engine.preflight import preflight
from v4export.plugins.limits import MAX_ELEMENTS
from v4export.plugins.moe_experts import onnx as moe_experts

#: (experts, rows, columns) of gates, and in how many parts they are made.
REAL = {
    "deepseek-v2-lite": ((64, 1408, 2048), 1),
    "deepseek-v3": ((256, 2048, 7168), 2),
    "kimi-k2": ((384, 2048, 7168), 3),
    "deepseek-v4-flash": ((256, 2048, 4096), 2),  # 2**31, one too many
    "deepseek-v4-pro": ((384, 3072, 7168), 4),
    "just small enough": ((1, 1, MAX_ELEMENTS), 1),
}


@pytest.mark.parametrize(("sizes", "number"), REAL.values(), ids=REAL)
def test_parts(sizes, number):
    assert moe_experts.parts(*sizes) == number


def test_parts_of_unequal_sizes_fit(monkeypatch):
    monkeypatch.setattr(moe_experts, "MAX_ELEMENTS", 100)
    for count in range(1, 12):
        for rows in range(1, 12):
            for columns in (1, 3, 9):
                if max(count, rows) * columns > 100:
                    continue
                number = moe_experts.parts(count, rows, columns)
                assert -(-count // number) * rows * columns <= 100 and count * -(-rows // number) * columns <= 100
                assert number == 1 or count * rows * columns > 100


def test_what_cannot_be_stacked(monkeypatch):
    monkeypatch.setattr(moe_experts, "MAX_ELEMENTS", 100)
    with pytest.raises(ValueError, match="cannot be stacked"):
        moe_experts.parts(101, 1, 1)


#: M, E, K, D, F; the least number of elements in a tensor that leaves several parts, some of unequal sizes
CASES = {
    "plain": ((5, 7, 3, 22, 10), None, 700),
    "fp8": ((3, 5, 2, 160, 136), (128, 128), 40000),
    "fp4": ((3, 5, 2, 64, 96), E2M1, 8000),
}


def stacks_of(model) -> list[int]:
    """How many stacks are gathered from, for gates, ups and downs together."""
    function = next(f for f in model.functions.values() if f.name == "MoeExperts")
    gathered = [node for node in function if node.op_type == "Gather"]
    assert all(node.inputs[0].producer().op_type == "Concat" for node in gathered)
    return len(gathered)


@pytest.mark.parametrize(("sizes", "block", "most"), CASES.values(), ids=CASES)
def test_parts_compute_what_a_whole_does(monkeypatch, sizes, block, most):
    o = operands(*sizes, block=block, limit=0.75)
    wanted = eager(o)
    assert stacks_of(node_model(o)) == 3
    whole = body(o)
    monkeypatch.setattr(moe_experts, "MAX_ELEMENTS", most)
    assert stacks_of(node_model(o)) > 5
    # onnxruntime may add up a product of fewer rows in another order.
    np.testing.assert_allclose(body(o), whole, rtol=0, atol=1e-6 * max(1, np.abs(whole).max()))
    np.testing.assert_allclose(body(o), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize(("sizes", "block", "most"), CASES.values(), ids=CASES)
def test_no_tensor_of_the_body_is_larger(monkeypatch, sizes, block, most):
    o = operands(*sizes, block=block, dtype=ml_dtypes.bfloat16)
    monkeypatch.setattr("v4export.engine.bodies.MAX_ELEMENTS", most)
    proto = ir.to_proto(node_model(o))
    found = {problem.rule for problem in preflight(proto)}
    assert "large-tensor" in found
    monkeypatch.setattr(moe_experts, "MAX_ELEMENTS", most)
    assert "large-tensor" not in {problem.rule for problem in preflight(ir.to_proto(node_model(o)))}
    onnx.checker.check_model(ir.to_proto(node_model(o)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "target"), [(None, "sm80"), ((128, 128), "sm89"), (E2M1, "sm120")], ids=["plain", "fp8", "fp4"]
)
def test_tensorrt_rtx_builds_parts_and_keeps_the_bytes(monkeypatch, tmp_path, block, target):
    monkeypatch.setattr(moe_experts, "MAX_ELEMENTS", 12 * 256 * 512 // 4)
    o = operands(4, 12, 2, 512, 256, block=block, dtype=ml_dtypes.bfloat16, limit=10.0)
    model = node_model(o)
    assert stacks_of(model) == 12
    builds(model, (("M", 512), ("M", 2), ("M", 2)), {"M": (1, 4, 4)}, tmp_path, target=target)
    stored = sum(w.size for part in o.parts for w in part) * {None: 16, (128, 128): 8, E2M1: 4}[block] // 8
    scales = sum(s.nbytes for part in o.scales for s in part)
    assert stored + scales < (tmp_path / "model.engine").stat().st_size < stored + scales + 3 * 2**19
