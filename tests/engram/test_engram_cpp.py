"""engram.hpp gives the bits that Python gives, and refuses what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from engram_subject import SMALL, TOKEN_MAP, fp8_table, store

import v4export.engram
from v4export.config.hashes import layouts
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.errors import BadInput

COMPILER = shutil.which("g++")
HERE, HEADER = Path(__file__).parent, Path(v4export.engram.__file__).parent
TYPES = ["F8_E4M3", "F8_E8M0", "BF16", "F16", "F32"]
HASHER = Hasher.of(SMALL, TOKEN_MAP)
PLAIN = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++ to compile engram.hpp with")


def compiled(folder: Path, *options: str) -> Path:
    program = folder / "driver"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
    command = [COMPILER, "-std=c++17", "-O2", *options, *warnings, f"-I{HEADER}", HERE / "driver.cpp", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if options and "cannot find" in done.stderr:
        pytest.skip("g++ comes without its sanitizers")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def checked_driver(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("checked"), "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def tables(folder, kind="F8_E4M3"):
    """Layer -> its tensors."""
    made = {}
    for layer, hashes in layouts(SMALL).items():
        if kind == "F8_E4M3":
            made[layer] = fp8_table(folder, hashes.rows, seed=layer)
        else:
            array = np.random.default_rng(layer).standard_normal((hashes.rows, 64)) * 10.0 ** np.arange(-32, 32)
            # Float16 has neither the large nor, but as subnormals, the small of these.
            array = np.clip(array, -65504, 65504).astype(PLAIN[kind])
            made[layer] = store(folder / f"{kind}{layer}", "embed", array), None
    return made


def words(stored, batch, steps) -> Iterator[object]:
    """What the driver reads."""

    def listed(array):
        flat = [] if array is None else np.ravel(np.asarray(array, np.int64)).tolist()
        return [len(flat), *flat]

    def placed(tensor):
        return [tensor.file, tensor.offset, *tensor.shape, TYPES.index(tensor.dtype)]

    yield from [SMALL.heads, HASHER.pad, SMALL.compressed_vocab, *listed(TOKEN_MAP), len(stored)]
    for layer, (data, scale) in stored.items():
        hashes = layouts(SMALL)[layer]
        yield from [*listed(hashes.multipliers), *listed(hashes.primes), *placed(data), int(scale is not None)]
        if scale:
            yield from placed(scale)
    yield from [batch, len(steps)]
    for tokens, *rest in steps:
        yield tokens.shape[1]
        for array in (tokens, *rest):
            yield from listed(array)


def run(program, stored, batch, steps):
    text = " ".join(map(str, words(stored, batch, steps)))
    return subprocess.run([program], input=text.encode(), capture_output=True, timeout=120)


def expected(stored, batch, steps):
    opened, history, out = {i: Table(*pair) for i, pair in stored.items()}, HASHER.empty_history(batch), []
    for arguments in steps:
        rows, history = HASHER.rows(arguments[0], history, *arguments[1:])
        out.append(history)
        for layer, numbers in rows.items():
            out += [numbers, opened[layer].gather(numbers), opened[layer].gather(numbers, ml_dtypes.bfloat16)]
    return b"".join(array.tobytes() for array in out)


def random_steps(batch):
    rng = np.random.default_rng(5)
    for size in (7, 1, 4, 1, 0, 30, 2):
        tokens, lengths = rng.integers(0, 40, (batch, size)), rng.integers(0, size + 1, batch)
        masked, starts = (rng.random((batch, size)) < 0.25 for _ in range(2))
        yield tokens, None, None, None
        yield np.where(np.arange(size) < lengths[:, None], tokens, -9), lengths, masked, starts


@pytest.mark.parametrize("which", ["driver", pytest.param("checked_driver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["F8_E4M3", *PLAIN])
def test_the_bits_are_the_same(request, tmp_path, which, kind):
    stored, steps = tables(tmp_path, kind), list(random_steps(3))
    done = run(request.getfixturevalue(which), stored, 3, steps)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == expected(stored, 3, steps)


@pytest.mark.parametrize(
    "tokens", [np.array([[3, 40]]), np.array([[-1, 3]])], ids=["beyond the vocabulary", "below zero"]
)
def test_tokens_are_refused_alike(driver, tmp_path, tokens):
    stored = tables(tmp_path)
    with pytest.raises(BadInput) as error:
        HASHER.rows(tokens, HASHER.empty_history(1))
    done = run(driver, stored, 1, [(tokens, None, None, None)])
    assert done.returncode == 2 and done.stderr.decode() == str(error.value)


def test_lengths_are_refused_alike(driver, tmp_path):
    step = (np.array([[3, 4]]), np.array([3]), None, None)
    with pytest.raises(BadInput) as error:
        HASHER.rows(step[0], HASHER.empty_history(1), step[1])
    done = run(driver, tables(tmp_path), 1, [step])
    assert done.returncode == 2 and done.stderr.decode() == str(error.value)


@pytest.mark.parametrize(("which", "says"), [(0, "column 0 is nan"), (1, "column 0 is nan")])
def test_corrupt_tables_are_refused(driver, tmp_path, which, says):
    stored = tables(tmp_path)
    with stored[4][which].file.open("r+b") as stream:
        stream.seek(stored[4][which].offset)
        stream.write(b"\xff" * stored[4][which].nbytes)
    done = run(driver, stored, 1, [(np.array([[3, 4]]), None, None, None)])
    assert done.returncode == 2 and done.stderr.startswith(b"the Engram table is corrupt\n  ")
    assert says.encode() in done.stderr and stored[4][0].file.name.encode() in done.stderr


def test_short_and_missing_files_are_refused(driver, tmp_path):
    stored = tables(tmp_path)
    step = [(np.array([[3, 4]]), None, None, None)]
    os.truncate(stored[1][0].file, stored[1][0].nbytes)
    done = run(driver, stored, 1, step)
    assert done.returncode == 2 and done.stderr.startswith(b"the Engram table is corrupt\n  ")
    stored[1][0].file.unlink()
    done = run(driver, stored, 1, step)
    assert done.returncode == 2 and b"cannot be opened" in done.stderr
