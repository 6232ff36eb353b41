"""Units of a build: what a later one takes, and what it makes anew."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from v4export.plain import from_plain, to_json
from v4export.progress import Stages, StageTime
from v4export.units import JOURNAL, Units, content


@pytest.fixture
def home(tmp_path):
    (tmp_path / "result").mkdir()
    return tmp_path


def opened(home, common=None, stages=None):
    return Units(home / "result", home, common=common, stages=stages)


def made(units, name="a", depends=1, text=b"content", files=None):
    """The unit's value, and whether it was made."""
    calls = []

    def making(at):
        calls.append(1)
        for file in files or [f"deep/{name}"]:
            at(file).write_bytes(text)
        return len(text)

    return units.once(name, depends, int, making), bool(calls)


def there(home):
    result = home / "result"
    return {p.relative_to(result).as_posix() for p in result.rglob("*") if p.is_file()}


def test_a_unit_is_taken(home):
    assert made(opened(home)) == (7, True)
    (home / "result" / "something else").write_text("x")
    units = opened(home)
    assert there(home) == set()
    assert made(units) == (7, False) == made(units)
    assert there(home) == {"deep/a"} and units.hashes == {"deep/a": content(home / "result" / "deep" / "a", 0, 7)}
    assert made(opened(home)) == (7, False)


@pytest.mark.parametrize("change", [{"depends": 2}, {"name": "b", "files": ["deep/a"]}])
def test_what_depends_on_something_else_is_made_anew(home, change):
    made(opened(home))
    assert made(opened(home), **change, text=b"other") == (5, True)
    assert (home / "result" / "deep" / "a").read_bytes() == b"other"


def test_another_version_makes_everything_anew(home):
    made(opened(home, "one"))
    assert made(opened(home, "two"))[1] and not made(opened(home, "two"))[1]


@pytest.mark.parametrize("damage", [b"Content", b"conten", b"content ", b"", None])
def test_a_file_that_has_changed_is_made_anew(home, damage):
    made(opened(home))
    file = home / "result" / "deep" / "a"
    file.unlink() if damage is None else file.write_bytes(damage)
    assert made(opened(home)) == (7, True)
    assert file.read_bytes() == b"content" and not made(opened(home))[1]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_last_line_that_is_cut_off_is_left_out(home, cut):
    units = opened(home)
    made(units), made(units, "b")
    journal = home / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-cut])
    units = opened(home)
    # Without its newline alone, a line is whole.
    assert not made(units)[1] and made(units, "b")[1] == (cut > 1)
    made(units, "c")
    units = opened(home)
    assert [made(units, name)[1] for name in "abc"] == [False] * 3


@pytest.mark.parametrize("line", [b"{", b"[]", b"null", b'{"name": 1}', b"\xff\xfe", b"[" * 5000])
def test_a_line_that_is_none_is_left_out(home, line):
    made(opened(home))
    with open(home / JOURNAL, "ab") as journal:
        journal.write(line + b"\n")
    assert not made(opened(home))[1]


@pytest.mark.parametrize("name", ["../outside", "/outside"])
def test_a_journal_names_no_file_outside(home, name):
    (home.parent / "outside").write_bytes(b"content")
    made(opened(home))
    record = json.loads((home / JOURNAL).read_text())
    record["files"] = {name: record["files"]["deep/a"]}
    (home / JOURNAL).write_text(json.dumps(record) + "\n")
    assert made(opened(home))[1]


def test_what_fails_is_not_there(home):
    def failing(at):
        at("half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(home).make("half", 1, failing)
    assert {p.name for p in home.iterdir()} == {"result"} and there(home) == set()


def test_a_file_is_in_place_before_the_journal_says_so(home, monkeypatch):
    """Power may go at any moment: written, on the disk, renamed, and only then recorded."""
    order = []
    for name in ("fsync", "replace"):
        call = getattr(__import__("os"), name)
        monkeypatch.setattr(f"v4export.units.os.{name}", lambda *a, n=name, c=call: (order.append(n), c(*a))[1])
    monkeypatch.setattr(Units, "_write", lambda *_: order.append("journal"))
    made(opened(home))
    assert order == ["fsync", "replace", "fsync", "journal"]


def test_what_is_not_worth_it_is_made_anew(home):
    opened(home).make("a", 1, lambda _: 7, worth=lambda value: value > 7)
    assert opened(home).find("a", 1, int) is None


def outer(units, depends=1):
    def making(at):
        at("outer").write_text("o")
        return made(units, "inner")[0]

    return units.once("outer", depends, int, making)


def test_a_unit_of_others_needs_them(home):
    outer(opened(home))
    assert opened(home).find("outer", 1, int) == 7 and there(home) == {"outer", "deep/inner"}
    (home / "result" / "deep" / "inner").write_bytes(b"changed")
    units = opened(home)
    assert units.find("outer", 1, int) is None and there(home) == set()
    assert outer(units) == 7 and opened(home).find("outer", 1, int) == 7


def test_a_unit_of_others_may_be_made_anew_without_them(home):
    outer(opened(home))
    units = opened(home)
    outer(units, 2)
    assert not made(units, "inner")[1] and opened(home).find("outer", 2, int) == 7


def test_stages_cost_what_they_did(home):
    def making(_):
        with stages.stage("long"):
            return True

    stages = Stages(quiet=True)
    opened(home, stages=stages).make("a", 1, making)
    later = Stages(quiet=True)
    assert opened(home, stages=later).find("a", 1, bool) is True
    assert later.done == stages.done and later.done[0].name == "long"


def test_nothing_is_kept_without_a_home(tmp_path):
    assert made(Units(tmp_path)) == (7, True) == made(Units(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"deep"}


@dataclass(frozen=True)
class Sample:
    name: str
    pair: tuple[str, int]
    many: tuple[StageTime, ...]
    table: dict[str, int]
    of: list[tuple[str, str]]
    maybe: float | None = None


def test_results_come_back_from_json():
    sample = Sample("x", ("y", 1), (StageTime("s", 0.1, 2.0),), {"a": 1}, [("b", "c")])
    assert from_plain(Sample, json.loads(to_json(sample))) == sample
    with pytest.raises(TypeError):
        from_plain(Sample, {**json.loads(to_json(sample)), "name": 3})
