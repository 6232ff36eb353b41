"""Readers of strangers' files take or refuse every case that fuzzing has kept, and mutations of it, within limits."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).with_name("fuzz")
sys.path.insert(0, str(FUZZ))

import mutators  # noqa: E402
import targets  # noqa: E402

from v4export.checkpoint.tensor import parse_header, read_header  # noqa: E402
from v4export.errors import BadInput, V4Error  # noqa: E402
from v4export.side_files import MOST_BYTES, is_inside, json_value, read  # noqa: E402

ENTRIES, BYTES = 250, 300_000


def cases(name: str) -> list[bytes]:
    kept = sorted((targets.CORPUS / name).iterdir()) if (targets.CORPUS / name).is_dir() else []
    return [*targets.READERS[name].seeds(), *(file.read_bytes() for file in kept)]


@pytest.fixture
def measured():
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", targets.READERS)
def test_corpus(name, measured):
    reader = targets.READERS[name]
    taken = 0
    for case in cases(name):
        tracemalloc.reset_peak()
        before, start = tracemalloc.get_traced_memory()[0], time.monotonic()
        taken += targets.run(reader, case)
        assert time.monotonic() - start < targets.SECONDS, case
        assert tracemalloc.get_traced_memory()[1] - before < targets.MEMORY, case
    assert taken or name == "bundle"


@pytest.mark.parametrize("name", [name for name, reader in targets.READERS.items() if reader.prefix is not None])
def test_mutations(name):
    reader, rng = targets.READERS[name], random.Random(5)
    pool = cases(name)
    for _ in range(150):
        case = mutators.mutated(rng.choice(pool), reader.prefix, rng)
        if case is not None and len(case) <= reader.most:
            targets.run(reader, case)


def test_corpus_is_small():
    files = [file for file in targets.CORPUS.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} == set(targets.READERS)
    assert len(files) <= ENTRIES and sum(file.stat().st_size for file in files) <= BYTES


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_taken_of_a_header_safetensors_takes(seed):
    """The format's own library agrees, but for types that it knows and this project does not."""
    rng = random.Random(seed)
    case = rng.choice(cases("header"))
    for _ in range(3):
        case = mutators.mutated(case, 8, rng) or case
    try:
        _, tensors = parse_header(Path("x"), io.BytesIO(case), len(case))
    except V4Error:
        return
    theirs = dict(safetensors.deserialize(case))
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (tensor.dtype, tensor.shape)
        assert bytes(theirs[name]["data"]) == case[tensor.offset : tensor.offset + tensor.nbytes]


def header(text: str, data: int = 0) -> None:
    case = len(text).to_bytes(8, "little") + text.encode() + bytes(data)
    parse_header(Path("x"), io.BytesIO(case), len(case))


def many_names() -> str:
    return "{" + ", ".join(f'"t{i}": 0' for i in range(60_000)) + ', "t59999": 0}'


SLOW = {
    "a shape whose product has a million digits": (
        lambda: json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}}),
        "at most 64 axes",
    ),
    "a name twice among many": (many_names, "'t59999' twice"),
    "nested without end": (lambda: '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    "a number without end": (lambda: '{"a": ' + "9" * 1_000_000 + "}", "digits"),
}


@pytest.mark.parametrize("name", SLOW)
def test_header_that_would_take_for_ever(name):
    make, words = SLOW[name]
    text, start = make(), time.monotonic()
    with pytest.raises(BadInput, match=words):
        header(text, 4)
    assert time.monotonic() - start < targets.SECONDS


def test_header_that_is_too_large(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((MOST_BYTES + 1).to_bytes(8, "little") + b"{}")
    os.truncate(file, MOST_BYTES + 100)
    with pytest.raises(BadInput, match="not a safetensors file"):
        read_header(file)


def test_file_that_is_too_large_or_none(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b"{}")
    assert read(file, 2) == b"{}"
    with pytest.raises(BadInput, match="too large"):
        read(file, 1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="not a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["", "/a", "..", "a/../../b", "../a", "a\0b", None, 3])
def test_paths_that_lead_out(name):
    assert not is_inside(name)


@pytest.mark.parametrize("name", ["a", "a/b", "weights/model-00001.safetensors", "..a"])
def test_paths_that_stay(name):
    assert is_inside(name)


@pytest.mark.parametrize("data", [b'"\\ud800"', b'{"\\udfff": 1}', '"é"'.encode("utf-16"), b"\xff", b"[" * 100_000])
def test_json_that_is_none(data):
    with pytest.raises(ValueError):
        json_value(data)


def test_watch_sees_what_is_forbidden(tmp_path):
    """The fuzzer's own alarm: a file elsewhere, a pickle, a process."""

    def opens(case: bytes) -> None:
        (tmp_path / "x").write_bytes(case)

    def unpickles(case: bytes) -> None:
        pickle.loads(b"cos\nsystem\n.")

    def starts(case: bytes) -> None:
        subprocess.run(["true"])

    for reads in (opens, unpickles, starts):
        with pytest.raises(AssertionError):
            targets.run(targets.Reader(reads, list), b"")
