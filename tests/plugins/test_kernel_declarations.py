"""Sizes, declarations and launches, which say how kernels are compiled and launched."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4export.plugins.kernels.kernel import Kernel, Launch, Typed, included
from v4export.plugins.kernels.names import kernels, main
from v4export.plugins.kernels.size import NUMBERS, Size, cdiv, least, most, operate, size

LIBRARY = Path(__file__).resolve().parents[2] / "plugins" / "library"
M, N = Size("i0.0"), Size("i1.2")


def test_text_is_postfix() -> None:
    assert (cdiv(M + 3, 16) * N).text() == "i0.0 3 + 16 cdiv i1.2 *"


sizes = st.recursive(
    st.integers(1, 40).map(size) | st.sampled_from(["i0.0", "i1.2"]).map(size),
    lambda inner: st.tuples(st.sampled_from(sorted(NUMBERS)), inner, inner).map(lambda t: Size(t[0], (t[1], t[2]))),
)


@given(sizes, st.integers(1, 50), st.integers(1, 50))
def test_text_says_the_same(one: Size, m: int, n: int) -> None:
    dims = {"i0.0": m, "i1.2": n}
    try:
        wanted = one.evaluate(dims)
    except ZeroDivisionError:
        return
    assert Size.parse(one.text()).evaluate(dims) == wanted


def test_numbers_are_computed_at_once() -> None:
    assert most(2, least(7, 5)) == size(5) and operate("div", 7, 2) == size(3)


def test_numbers_may_stand_on_either_side() -> None:
    assert [one.text() for one in (2 + M, 2 - M, 2 * M, M // 2)] == ["2 i0.0 +", "2 i0.0 -", "2 i0.0 *", "i0.0 2 div"]


def test_a_malformed_text_is_refused() -> None:
    for text in ("", "1 2", "1 +"):
        with pytest.raises((ValueError, IndexError)):
            Size.parse(text)


KERNEL = Kernel(
    "TwoWords",
    Path("none.cu"),
    inputs=("x T M D", "y float32 M K"),
    outputs=("z T M D", "w int32 L 3"),
    compiled="D",
    scalars="M L",
    choose=lambda d: {"TILE": d.D // 2, "KIND": d.type_T},
    derived={"L": lambda d: least(d.M, d.TILE)},
    grid=lambda d: (cdiv(d.M, 4), d.L),
    threads=lambda d: 2 * d.TILE,
    shared=lambda d: 16 * d.TILE,
)


def test_a_declaration_becomes_a_launch() -> None:
    one = KERNEL.compilable([Typed("float16", (None, 64)), Typed("float32", (None, 8))], {"SCALE": 0.1, "WAY": "FAST"})
    assert one.launch.text().splitlines() == [
        "entry two_words",
        "threads 64",
        "shared 512",
        "scalar i0.0",
        "scalar i0.0 32 min",
        "grid i0.0 4 cdiv",
        "grid i0.0 32 min",
        "grid 1",
        "output float16: i0.0, 64",
        "output int32: i0.0 32 min, 3",
    ]
    defines = dict(one.defines)
    assert {k: defines[k] for k in ("DIM_D", "TYPE_T", "TILE", "WAY", "ENTRY", "THREADS", "SHARED_SIZE")} == {
        "DIM_D": "64", "TYPE_T": "half", "TILE": "32", "WAY": "FAST", "ENTRY": "two_words", "THREADS": "64",
        "SHARED_SIZE": "512",
    }  # fmt: skip
    assert float.fromhex(defines["SCALE"].strip("()f")) == 0.1
    assert Launch.parse(one.launch.text()) == one.launch


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ([Typed("float16", (None, 64))], "takes 2 inputs, not 1"),
        ([Typed("int64", (None, 64)), Typed("float32", (None, 8))], "x is int64, not one of"),
        ([Typed("float16", (None, 64)), Typed("float16", (None, 8))], "y is float16, not float32"),
        ([Typed("float16", (None, None)), Typed("float32", (None, 8))], "D must be known"),
        ([Typed("float16", (3, 64)), Typed("float32", (4, 8))], "M is 3 and, in y, 4"),
        ([Typed("float16", (None, 64, 1)), Typed("float32", (None, 8))], r"x is \[M D\]"),
    ],
)
def test_operands_that_do_not_fit_are_refused(operands: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KERNEL.compilable(operands, {})


def test_files_are_included_once(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text("// a\n")
    (tmp_path / "b.cuh").write_text('#include "a.cuh"\n// b\n')
    (tmp_path / "k.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n// k\n')
    assert included(tmp_path / "k.cu") == "// a\n// b\n// k\n"


def test_every_entry_point_is_in_its_source() -> None:
    for kernel in kernels().values():
        text = kernel.source.read_text()
        assert f"\n{kernel.entry}(" in text or "\nENTRY(" in text, kernel.name


def test_every_kernel_says_what_it_must_move() -> None:
    for source in {kernel.source for kernel in kernels().values()}:
        comment = source.read_text().split("#include")[0]
        assert "Bytes:" in comment, source


def test_the_library_registers_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert capsys.readouterr().out == (LIBRARY / "kernels.inc").read_text()
