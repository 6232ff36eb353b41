"""Rows out of files: the numbers, the errors, and the memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from engram_subject import fp8_table, store

from v4export.checkpoint.formats import dequantize_blocks
from v4export.config.hashes import NO_ROW
from v4export.engram.table import Table
from v4export.errors import BadInput

ROWS = 3000


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return fp8_table(tmp_path_factory.mktemp("table"), ROWS)


def whole(fp8):
    return dequantize_blocks(fp8[0].numpy(), fp8[1].numpy(), (1, 32))


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 3000), (5,), (), (0,)])
def test_rows_are_those_of_the_whole_table(fp8, shape, prefetch):
    rows = np.random.default_rng(0).integers(0, ROWS, shape)
    found = Table(*fp8, prefetch=prefetch).gather(rows)
    assert found.dtype == np.float32 and np.array_equal(bits(found), bits(whole(fp8)[rows]))


def test_bfloat16_is_rounded_once(fp8):
    rows = np.random.default_rng(1).integers(0, ROWS, (2, 40))
    found = Table(*fp8).gather(rows, ml_dtypes.bfloat16)
    assert np.array_equal(bits(found), bits(whole(fp8)[rows].astype(ml_dtypes.bfloat16)))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_types(tmp_path, stored, dtype):
    array = np.random.default_rng(2).standard_normal((70, 5)).astype(stored)
    rows = np.array([[69, 0, 3], [3, 3, NO_ROW]])
    found = Table(store(tmp_path / "plain", "embed", array)).gather(rows, dtype)
    expected = array[rows].astype(np.float32)
    expected[1, 2] = 0
    assert np.array_equal(bits(found), bits(expected.astype(dtype)))


def test_no_row_is_zeros(fp8):
    rows = np.array([[NO_ROW, 7], [8, NO_ROW]])
    found = Table(*fp8).gather(rows)
    assert not bits(found[[0, 1], [0, 1]]).any() and np.array_equal(found[0, 1], whole(fp8)[7])
    assert not bits(Table(*fp8).gather(rows[:1, :1])).any()


def test_threads_share_a_table(fp8):
    table, rows = Table(*fp8), np.random.default_rng(3).integers(0, ROWS, (40, 100))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(table.gather, rows))
    assert np.array_equal(np.array(found), whole(fp8)[rows])


@pytest.mark.parametrize(("rows", "named"), [([0, ROWS], ROWS), ([-2, 1], -2)])
def test_rows_outside_the_table(fp8, rows, named):
    with pytest.raises(BadInput, match=f"rows are not in the Engram table\n  {named}; .* rows 0 to {ROWS - 1}"):
        Table(*fp8).gather(np.array(rows))


def patched(tmp_path, which, row, column, byte):
    stored = list(fp8_table(tmp_path, 50))
    with stored[which].file.open("r+b") as stream:
        stream.seek(stored[which].offset + row * stored[which].shape[1] + column)
        stream.write(bytes([byte]))
    return Table(*stored)


@pytest.mark.parametrize(("which", "byte"), [(0, 0x7F), (0, 0xFF), (1, 255)])
def test_nan_is_corrupt(tmp_path, which, byte):
    table = patched(tmp_path, which, 17, 1, byte)
    column = 1 if which == 0 else 32
    with pytest.raises(
        BadInput, match=rf"table is corrupt\n  .*data0.bin, embed.weight: row 17, column {column} is nan"
    ):
        table.gather(np.array([3, 17, 17]))
    assert np.isfinite(table.gather(np.array([3, 16]))).all()


def test_what_overflows_is_not_made_infinite(tmp_path):
    codes = np.full((3, 32), 448, ml_dtypes.float8_e4m3fn)
    scales = np.array([[127], [140], [254]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    table = Table(store(tmp_path / "data", "w", codes), store(tmp_path / "scale", "s", scales))
    assert table.gather(np.array([0, 1])).max() == 448 * 2**13
    with pytest.raises(BadInput, match=r"out of the range of its type\n .*row 1, column 0 is 3670016.*float16"):
        table.gather(np.array([0, 1]), np.float16)
    with pytest.raises(BadInput, match=r"corrupt\n.* row 2, column 0 is inf"):
        table.gather(np.array([2]))


@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_is_too_short(tmp_path, which):
    stored = fp8_table(tmp_path, 50)
    open_table = Table(*stored)
    os.truncate(stored[which].file, stored[which].offset + stored[which].nbytes - 1)
    open_table.gather(np.array([48]))
    with pytest.raises(BadInput, match=f"corrupt\n.*{stored[which].file.name}.*has become shorter: row 49"):
        open_table.gather(np.array([1, 49]))
    with pytest.raises(BadInput, match=f"corrupt\n.*{stored[which].file.name}.* it ends at byte"):
        Table(*stored)
    stored[which].file.unlink()
    with pytest.raises(BadInput, match="cannot be opened"):
        Table(*stored)


def test_what_is_no_table(fp8):
    data, scale = fp8
    for pair in (
        (data, None), (data, data), (scale, None), (replace(data, shape=(ROWS * 64,)), scale),
        (data, replace(scale, shape=(ROWS // 2, 4))), (replace(data, dtype="U8"), None),
        (replace(data, dtype="F32"), scale),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="a tensor is not an Engram table"):
            Table(*pair)


def test_a_closed_table_reads_no_other_file(fp8):
    table = Table(*fp8)
    table.close()
    table.close()
    with open(fp8[1].file, "rb"), pytest.raises(ValueError, match="closed file"):
        table.gather(np.array([1]))


RESIDENT = """
import sys, numpy as np
from pathlib import Path
from v4export.checkpoint.tensor import StoredTensor
from v4export.engram.table import Table
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
rows, file = 12_000_000, Path(sys.argv[1])
data = StoredTensor("w", file, "F8_E4M3", (rows, 256), 0, rows * 256)
table = Table(data, StoredTensor("s", file, "F8_E8M0", (rows, 8), rows * 256, rows * 8))
rng = np.random.default_rng(0)
table.gather(rng.integers(0, rows, 1000))
before = resident()
for _ in range(80):  # 80 000 rows, nearly each on a page of its own
    table.gather(rng.integers(0, rows, 1000))
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_rows_touched(tmp_path):
    file = tmp_path / "sparse"
    file.touch()
    os.truncate(file, 12_000_000 * 264)
    done = subprocess.run([sys.executable, "-c", RESIDENT, file], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6
