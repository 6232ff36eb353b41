from __future__ import annotations

import pytest

from v4export.engine.targets import (
    FALLBACK,
    FALLBACK_NOTES,
    TARGETS,
    fallback,
    find_target,
    resolve_targets,
    support_rows,
)
from v4export.errors import BadInput, NotSupported
from v4export.precision import PRECISIONS


def resolve(targets, precision, *args, **kwargs):
    return resolve_targets(targets, PRECISIONS[precision], *args, **kwargs)


def names(*args, **kwargs):
    return [target.name for target in resolve(*args, **kwargs)]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sm89", "sm89"), ("SM_89", "sm89"), ("8.9", "sm89"), ("compute_89", "sm89"), ("RTX 4090", "sm89"),
        ("l40s", "sm89"),
        ("NVIDIA GeForce RTX 5090", "sm120"), ("h200", "sm90"), ("a100", "sm80"), ("rtx3090", "sm86"), ("t4", "sm75"),
        ("b200", "sm100"), ("10.3", "sm103"),
    ],
)  # fmt: skip
def test_names(given, name):
    assert find_target(given).name == name


def test_unknown_name_offers_close_ones():
    with pytest.raises(BadInput, match="rtx4090"):
        find_target("rtx4099")
    with pytest.raises(BadInput, match="sm121"):
        find_target("sm122")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp32", ["sm80", "sm86", "sm89", "sm120", "sm121"]),
        ("bf16", ["sm80", "sm86", "sm89", "sm120", "sm121"]),
        ("fp8", ["sm89", "sm120", "sm121"]),
        ("mxfp4", ["sm120", "sm121"]),
    ],
)
def test_defaults_of_rtx(precision, expected):
    assert names(None, precision, "tensorrt_rtx") == expected


def test_standard_builds_for_what_is_present():
    assert names(None, "fp8", "tensorrt", ["sm90"]) == ["sm90"]
    with pytest.raises(NotSupported, match="no target with fp16"):
        resolve(None, "fp16", "tensorrt", ["sm75"])  # routing is float32, and no Turing multiplies that
    with pytest.raises(NotSupported, match="no target with fp8"):
        resolve(None, "fp8", "tensorrt", ["sm80"])
    assert names(None, "mxfp4", "tensorrt", ["sm100"]) == ["sm100"]
    with pytest.raises(NotSupported, match="no target with mxfp4"):
        resolve(None, "mxfp4", "tensorrt", ["sm90"])


def test_order_and_repeats():
    assert names(["rtx5090", "sm86", "sm120"], "fp16", "tensorrt_rtx") == ["sm86", "sm120"]


def test_precision_the_target_lacks():
    with pytest.raises(BadInput) as e:
        resolve(["rtx3090"], "fp8", "tensorrt_rtx")
    assert e.value.exit_code == 2
    assert "sm86" in str(e.value) and "fp16, bf16" in str(e.value) and "sm89, sm120, sm121" in str(e.value)


@pytest.mark.parametrize(("target", "offered"), [("sm89", True), ("sm80", False)])
def test_another_precision_is_offered_only_where_the_target_has_it(target, offered):
    with pytest.raises(BadInput, match="has no mxfp4") as e:
        resolve([target], "mxfp4", "tensorrt_rtx")
    assert ("such as fp8" in str(e.value)) is offered


NO_FP4 = "no FP4: experts are FP8 E4M3 in blocks"


@pytest.mark.parametrize(
    ("targets", "precision", "expected"),
    [
        (["sm89"], "mxfp4", ("fp8", f"sm89 has {NO_FP4}")),
        (["rtx5090", "h200", "sm89"], "mxfp4", ("fp8", f"sm89 and sm90 have {NO_FP4}")),
        (["rtx5090", "gb10"], "mxfp4", ("mxfp4", None)),
        (["sm80", "sm120"], "mxfp4", ("mxfp4", None)),  # FP8 would help sm80 no more than FP4
        (["sm80"], "fp8", ("fp8", None)),
        ([], "mxfp4", ("mxfp4", None)),
    ],
)
def test_fallback(targets, precision, expected):
    assert fallback(targets, precision) == expected


def test_every_fallback_has_a_note_and_is_a_precision():
    assert FALLBACK.keys() == FALLBACK_NOTES.keys() and {*FALLBACK, *FALLBACK.values()} <= {*PRECISIONS}


def test_target_of_the_other_package():
    with pytest.raises(NotSupported, match="package tensorrt is installed"):
        resolve(["h200"], "fp8", "tensorrt_rtx")
    with pytest.raises(NotSupported, match="tensorrt_rtx builds for it"):
        resolve(["rtx4090"], "fp8", "tensorrt", ["sm90"])


def test_the_table_says_what_resolve_does():
    header, *rows = support_rows()
    assert len(rows) == len(TARGETS) and all(len(row) == len(header) for row in rows)
    for row in rows:
        for name, recipe in PRECISIONS.items():
            ok = row[header.index(name)] == "yes"
            package = row[2]
            try:
                resolve_targets([row[0]], recipe, package, [row[0]])
                assert ok
            except BadInput:
                assert not ok
