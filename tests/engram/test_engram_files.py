"""engram.json and engram.map: what is written is read, and what does not fit together is refused."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from engram_subject import SMALL, TOKEN_MAP, fp8_table

from v4export.config.hashes import layouts
from v4export.engram.feed import EngramFeed
from v4export.engram.files import DESCRIPTION, MAP, EngramFiles, load_feed, write
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.errors import BadInput


@pytest.fixture
def tables(tmp_path):
    weights = tmp_path / "bundle" / "weights"
    return {layer: fp8_table(weights, hashes.rows, seed=layer) for layer, hashes in layouts(SMALL).items()}


@pytest.fixture
def bundle(tmp_path, tables):
    write(tmp_path / "bundle", SMALL, TOKEN_MAP, tables)
    return tmp_path / "bundle"


def test_round_trip(bundle, tables, tmp_path):
    hasher = Hasher.of(SMALL, TOKEN_MAP)
    expected = EngramFeed(hasher, {layer: Table(*pair) for layer, pair in tables.items()})
    tokens = np.arange(12).reshape(2, 6)
    moved = bundle.rename(tmp_path / "elsewhere")
    with load_feed(moved) as feed:
        found, history = feed.rows(tokens, feed.hasher.empty_history(2))
    # The first tables are open still, wherever their files are called now.
    rows, after = expected.rows(tokens, hasher.empty_history(2))
    assert np.array_equal(history, after) and all(np.array_equal(found[layer], rows[layer]) for layer in SMALL.layers)
    expected.close()


def test_what_is_written(bundle):
    found = json.loads((bundle / DESCRIPTION).read_text())
    hashes = layouts(SMALL)[4]
    assert (bundle / MAP).read_bytes() == TOKEN_MAP.astype("<i4").tobytes()
    assert [int(number) for number in found["layers"]["4"]["multipliers"]] == list(hashes.multipliers)
    assert found["layers"]["4"]["primes"] == list(hashes.primes)
    assert found["layers"]["4"]["table"]["file"] == "weights/data4.bin"


def edit(bundle, change):
    found = json.loads((bundle / DESCRIPTION).read_text())
    change(found)
    (bundle / DESCRIPTION).write_text(json.dumps(found))


def put(*path):
    """A change: the value at the end of a path."""

    def change(found):
        *parents, key, value = path
        for name in parents:
            found = found[name]
        found[key] = value

    return change


LAYER = ("layers", "1")
REFUSED = {
    "format": (put("format", 2), "made by another version"),
    "a key is missing": (lambda found: found.pop("pad"), "KeyError: 'pad'"),
    "a list": (put("map", []), "TypeError"),
    "no layers": (put("layers", {}), "there are no layers"),
    "name of a layer": (lambda f: f["layers"].update({"x": f["layers"]["1"]}), "'x' is not the number of a layer"),
    "true is no number": (put("heads", True), "heads is True"),
    "order": (put("max_order", 3), r"\(4, 9\) multipliers and primes"),
    "width": (put("width", 32), "does not match its hashes"),
    "pad": (put("pad", 23), "pad 23 is not one of 23"),
    "fewer ids": (put("compressed_vocab", 22), "ids that are not 0 to 21"),
    "too many ids": (put("compressed_vocab", 2**40), "too large"),
    "hash of the map": (put("map", "sha256", "0" * 64), "does not have the hash"),
    "tokens of the map": (put("map", "tokens", 41), "160 bytes, 41 tokens"),
    "map elsewhere": (put("map", "file", "../engram.map"), "leads out of the bundle"),
    "even multiplier": (put(*LAYER, "multipliers", ["2", "1", "1", "1"]), "not odd"),
    "multiplier is no number": (put(*LAYER, "multipliers", ["1", "1", "1", "0x1"]), "decimal digits"),
    "multiplier is not text": (put(*LAYER, "multipliers", [1, 1, 1, 1]), "AttributeError"),
    "prime": (put(*LAYER, "primes", [0] * 9), "a prime is 0"),
    "offsets": (put(*LAYER, "offsets", [0] * 9), "offsets are not the sums"),
    "rows": (put(*LAYER, "table", "shape", [5, 64]), "its shape and type need 320"),
    "type": (put(*LAYER, "table", "dtype", "F4"), "KeyError: 'F4'"),
    "type without multipliers": (put(*LAYER, "table", "dtype", "U8"), "not an Engram table"),
    "no multipliers": (put(*LAYER, "scale", None), "not an Engram table"),
    "offset": (put(*LAYER, "table", "offset", 101), "ends at byte"),
    "negative offset": (put(*LAYER, "table", "offset", -1), "offset is -1"),
    "absolute path": (put(*LAYER, "table", "file", "/etc/passwd"), "leads out of the bundle"),
    "path above": (put(*LAYER, "table", "file", "weights/../../x"), "leads out of the bundle"),
    "no file": (put(*LAYER, "table", "file", "weights/none"), "there is no weights/none"),
    "a folder": (put(*LAYER, "table", "file", "weights"), "there is no weights"),
    "path of another type": (put(*LAYER, "table", "file", 3), "TypeError"),
    "other layer's table": (lambda f: f["layers"]["1"].update(table=f["layers"]["4"]["table"]), "not an Engram table"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_what_does_not_fit_is_refused(bundle, case):
    change, says = REFUSED[case]
    edit(bundle, change)
    with pytest.raises(BadInput, match=says):
        EngramFiles.read(bundle)


def test_a_table_of_another_size_is_refused(bundle):
    def change(found):
        for part in ("table", "scale"):
            entry = found["layers"]["1"][part]
            entry["nbytes"] -= entry["shape"][1]
            entry["shape"][0] -= 1

    edit(bundle, change)
    with pytest.raises(BadInput, match="the Engram table of layer 1 does not match its hashes"):
        EngramFiles.read(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    file = bundle / "weights" / "data1.bin"
    file.rename(tmp_path / "outside")
    os.symlink(tmp_path / "outside", file)
    with pytest.raises(BadInput, match="leads out of the bundle"):
        EngramFiles.read(bundle)


def test_a_hard_link_is_a_file_of_the_bundle(bundle, tmp_path):
    file = bundle / "weights" / "data1.bin"
    file.rename(tmp_path / "outside")
    os.link(tmp_path / "outside", file)
    load_feed(bundle).close()


def test_a_map_that_has_changed_is_refused(bundle):
    changed = TOKEN_MAP.copy()
    changed[5] += 1
    (bundle / MAP).write_bytes(changed.tobytes())
    with pytest.raises(BadInput, match="does not have the hash"):
        EngramFiles.read(bundle)
    changed[5] = -1
    (bundle / MAP).write_bytes(changed.tobytes())
    edit(bundle, put("map", "sha256", hashlib.sha256(changed.tobytes()).hexdigest()))
    with pytest.raises(BadInput, match="ids that are not 0 to 22"):
        EngramFiles.read(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000])
def test_what_is_no_description(bundle, text):
    (bundle / DESCRIPTION).write_text(text)
    with pytest.raises(BadInput, match="is not whole"):
        EngramFiles.read(bundle)


@pytest.mark.parametrize("name", [DESCRIPTION, MAP])
def test_a_missing_file(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(BadInput, match=name):
        EngramFiles.read(bundle)


def test_writing_refuses_what_reading_would(bundle, tables, tmp_path):
    with pytest.raises(BadInput, match="does not match its hashes"):
        write(bundle, replace(SMALL, buckets=60), TOKEN_MAP, tables)
    with pytest.raises(BadInput, match="is not in the bundle"):
        write(bundle, SMALL, TOKEN_MAP, {**tables, 4: fp8_table(tmp_path, layouts(SMALL)[4].rows)})
