"""Which of plugin, native layer and body computes an op, and by which way a plugin gets in."""

from __future__ import annotations

import pytest

from v4export.engine.implementations import (
    BODY,
    DEFAULT_WAY,
    NATIVE,
    PLUGIN,
    WAYS,
    implementation,
    resolve_way,
    rows,
    shared_budget,
    ways_rows,
)
from v4export.engine.targets import PACKAGES, find_target, resolve_targets
from v4export.errors import BadInput, NotSupported
from v4export.plugins import OPS
from v4export.plugins.kernels.kernel import PLAIN_SHARED
from v4export.precision import PRECISIONS


@pytest.mark.parametrize("op", [op.op_type for op in OPS])
def test_every_op_has_an_implementation_with_a_reason(op: str) -> None:
    for way in WAYS:
        found = implementation(op, way.name)
        assert found.op == op and found.reason
        assert found.way != PLUGIN or way.name != "none"


def test_what_has_no_kernels_is_no_plugin() -> None:
    for op in OPS:
        assert (implementation(op.op_type, "aot").way == NATIVE) == (op.kernels is None)


def test_some_ops_are_left_to_tensorrt() -> None:
    assert implementation("HyperMix", "aot").way == BODY
    assert implementation("MoeExperts", "aot").way == PLUGIN
    assert implementation("TRT_BlockDequantize", "none").way == NATIVE


@pytest.mark.parametrize("backend", PACKAGES)
def test_the_default_is_a_way_of_the_package(backend: str) -> None:
    assert resolve_way(None, backend) == resolve_way("auto", backend) == DEFAULT_WAY[backend]
    assert resolve_way("library", backend) == "library"


def test_rtx_has_no_plugins_ahead_of_time() -> None:
    with pytest.raises(NotSupported, match="--plugins library"):
        resolve_way("aot", "tensorrt_rtx")


def test_an_unknown_way() -> None:
    with pytest.raises(BadInput, match="auto, aot, library, none"):
        resolve_way("static", "tensorrt")


def test_a_launch_has_what_all_targets_give() -> None:
    both = resolve_targets(["sm80", "sm89"], PRECISIONS["bf16"], "tensorrt_rtx")
    assert shared_budget("library", both) == 99 << 10
    assert shared_budget("library", both[:1]) == 163 << 10
    assert shared_budget("aot", both[:1]) == PLAIN_SHARED


def test_kernels_need_ampere() -> None:
    turing = [find_target("t4")]
    with pytest.raises(NotSupported, match="sm75"):
        shared_budget("library", turing)
    assert shared_budget("none", turing) == 0


def test_tables_are_whole() -> None:
    table = rows()
    assert [row[0] for row in table[1:]] == [op.op_type for op in OPS]
    assert {len(row) for row in table} == {4} and all(all(row) for row in table)
    assert [row[0] for row in ways_rows()[1:]] == [way.name for way in WAYS]
