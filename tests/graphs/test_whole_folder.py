"""A build appears whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from v4export import api, building
from v4export.errors import BadInput, NotEnough, NumbersDiffer
from v4export.package import whole as module
from v4export.package.bundle import MANIFEST
from v4export.package.whole import whole_folder

FAILURES = {
    "exception": (ValueError("no"), ValueError),
    "interrupt": (KeyboardInterrupt(), KeyboardInterrupt),
    "exit": (SystemExit(1), SystemExit),
    "bad input": (BadInput("no"), BadInput),
    "other OSError": (OSError(errno.EIO, "I/O error"), OSError),
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), NotEnough),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), NotEnough),
}


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


def make(out, text="one", force=False):
    with whole_folder(out, force) as folder:
        (folder / MANIFEST).write_text(text)


def test_success(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out, False) as folder:
        (folder / "file").write_text("x")
        assert not out.exists() and folder.stat().st_dev == out.parent.stat().st_dev
    assert entries(tmp_path / "deep") == ["out"] and entries(out) == ["file"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_nothing(tmp_path, failure, exists):
    raised, seen = failure
    if exists:
        make(tmp_path / "out", "old")
    with pytest.raises(seen), whole_folder(tmp_path / "out", force=True) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "half").write_text("x")
        raise raised
    assert entries(tmp_path) == (["out"] if exists else [])
    if exists:
        assert (tmp_path / "out" / MANIFEST).read_text() == "old"


def test_disk_full_says_what_is_left(tmp_path):
    said = r"disk of .* is full\n +\d+ MiB left"
    with pytest.raises(NotEnough, match=said) as caught, whole_folder(tmp_path / "out", False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 3


KEPT = {"interrupt", "exit", "disk full", "quota", "memory"}


@pytest.mark.parametrize("name", [*FAILURES, "memory"])
def test_what_can_be_gone_on_with_is_kept(tmp_path, name):
    raised, seen = FAILURES.get(name, (MemoryError(), MemoryError))
    with pytest.raises(seen) as caught, whole_folder(tmp_path / "out", False, resume=False) as folder:
        (folder / "half").write_text("x")
        (folder.parent / "journal").write_text("y")
        raise raised
    assert entries(tmp_path) == ([".out.partial"] if name in KEPT else [])
    assert any("--resume" in note for note in getattr(caught.value, "__notes__", ())) == (name in KEPT)
    vars(raised).pop("__notes__", None)


@pytest.fixture
def stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", False, resume=False) as folder:
        (folder / "half").write_text("x")
        (folder.parent / "journal").write_text("y")
        raise KeyboardInterrupt
    return tmp_path / "out"


@pytest.mark.parametrize("resume", [False, True, None])
def test_what_was_left_is_gone_on_with_or_discarded(stopped, resume):
    said = []
    with whole_folder(stopped, False, resume, said.append) as folder:
        assert entries(folder) == (["half"] if resume else [])
        assert (folder.parent / "journal").exists() == bool(resume)
    assert [line.split()[0] for line in said] == (["going"] if resume else ["discarding"])
    assert entries(stopped.parent) == ["out"]


def test_where_nothing_is_finished_nothing_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", False, resume=False) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert entries(tmp_path) == []


def test_nothing_to_resume(tmp_path):
    said = []
    with whole_folder(tmp_path / "out", False, True, said.append) as folder:
        assert entries(folder) == []
    assert said == [f"nothing to resume for {tmp_path / 'out'}: building it from the start"]


def test_a_wrong_option_loses_nothing(stopped):
    with pytest.raises(BadInput), whole_folder(stopped, False, resume=True):
        raise BadInput("no")
    assert entries(stopped.parent) == [".out.partial"]
    with whole_folder(stopped, False, resume=True) as folder:
        assert entries(folder) == ["half"]


@pytest.mark.parametrize("resume", [False, True, None])
def test_two_builds_of_one_folder(tmp_path, resume):
    with whole_folder(tmp_path / "out", False, resume=False) as folder:
        (folder / "mine").write_text("x")
        said = f"another build makes out\n +process {os.getpid()} has"
        with pytest.raises(BadInput, match=said), whole_folder(tmp_path / "out", False, resume):
            pass
        assert entries(folder) == ["mine"]
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_no_build_has_left_is_not_touched(tmp_path, kind):
    partial = tmp_path / ".out.partial"
    if kind == "file":
        partial.write_text("mine")
    else:
        home = partial if kind == "folder" else tmp_path / "elsewhere"
        home.mkdir()
        (home / "mine").write_text("x")
        if kind == "link":
            partial.symlink_to(home)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="is in the way"), whole_folder(tmp_path / "out", False, resume=False):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_while_renaming(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(module.os, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        make(tmp_path / "out")
    assert entries(tmp_path) == []


def test_what_fails_its_verification_is_kept_aside(tmp_path):
    for text in ("first", "second"):
        with pytest.raises(NumbersDiffer), whole_folder(tmp_path / "out", False) as folder:
            (folder / "report").write_text(text)
            (folder / MANIFEST).write_text("{}")
            raise NumbersDiffer("numbers differ")
    assert entries(tmp_path) == ["out.failed"]
    assert (tmp_path / "out.failed" / "report").read_text() == "second"


def test_a_folder_of_the_users_is_never_replaced_by_a_failure(tmp_path):
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed" / "mine").write_text("kept")
    with pytest.raises(NumbersDiffer), whole_folder(tmp_path / "out", False):
        raise NumbersDiffer("numbers differ")
    assert entries(tmp_path) == ["out.failed"]
    assert (tmp_path / "out.failed" / "mine").read_text() == "kept"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path, kind, force):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("x")
    with pytest.raises(BadInput, match="exists"):
        make(out, force=force)
    assert entries(tmp_path) == ["out"] and out.is_dir() == (kind != "file")
    assert kind != "folder" or entries(out) == ["mine"]


def test_a_bundle_is_replaced_only_by_force(tmp_path):
    out = tmp_path / "out"
    make(out, "old")
    (out / "left over").write_text("x")
    with pytest.raises(BadInput, match="--force"):
        make(out, "new")
    assert (out / MANIFEST).read_text() == "old"
    make(out, "new", force=True)
    assert entries(out) == [MANIFEST] and (out / MANIFEST).read_text() == "new"


@pytest.mark.parametrize("stage", ["foresee", "account_of", "export_graphs", "copy_tokenizer", "write_manifest"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")], ids=["stopped", "disk full"])
def test_interrupted_export(tiny_checkpoint, tmp_path, monkeypatch, stage, failure):
    def fail(*_: object, **__: object) -> None:
        raise failure

    if stage != "export_graphs":
        # The trace takes seconds and is not what is looked at here.
        monkeypatch.setattr(building, "export_graphs", lambda *a, **k: type("Graphs", (), {"linked": ()})())
    monkeypatch.setattr(building, stage, fail)
    before = {p.name: p.stat().st_mtime_ns for p in tiny_checkpoint.iterdir()}
    with pytest.raises((KeyboardInterrupt, NotEnough)):
        api.export(tiny_checkpoint, tmp_path / "out", precision="bf16")
    assert entries(tmp_path) == ([] if stage in ("foresee", "account_of") else [".out.partial"])
    assert {p.name: p.stat().st_mtime_ns for p in tiny_checkpoint.iterdir()} == before
    monkeypatch.undo()
    with pytest.raises(BadInput):
        api.export(tiny_checkpoint, tmp_path / "out", precision="bf16", max_seq_len=1 << 30)
    assert entries(tmp_path) == []
