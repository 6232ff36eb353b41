"""An engine's file is compared with what the manifest says of it before TensorRT deserialises it."""

from __future__ import annotations

import hashlib
import os

import pytest

from v4export.engine.admitted import check_engine
from v4export.errors import BadInput

VERSION = bytes([1, 7, 1, 116])


def plan(size: int = 64, said: int | None = None, version: bytes = VERSION, mask: int = 4 | 8) -> bytes:
    start = b"vtrt" + bytes(12) + (size if said is None else said).to_bytes(8, "little") + version + b"vtrt"
    return (start + mask.to_bytes(4, "little")).ljust(size, b"\0")


def report(data: bytes, **changes: object) -> dict[str, object]:
    facts = {"path": "model.engine", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return facts | {"backend": "tensorrt_rtx", "backend_version": "1.7.1.116", "targets": ["sm86", "sm89"]} | changes


def test_sound(tmp_path):
    (tmp_path / "model.engine").write_bytes(plan())
    assert check_engine(tmp_path, report(plan())) == tmp_path / "model.engine"
    other = b"ftrt" + bytes(60)
    (tmp_path / "model.engine").write_bytes(other)
    check_engine(tmp_path, report(other, backend="tensorrt", backend_version="10.15"))


WRONG = {
    "shorter": (plan(60), "has 60 bytes, the manifest says 64"),
    "another byte": (plan()[:-1] + b"\1", "its sha256 is not the manifest's"),
    "its own length": (plan(said=99), "its header says 99 bytes, it has 64"),
    "another version": (plan(version=bytes([1, 8, 0, 1])), "header says version 1.8.0.1, the manifest 1.7.1.116"),
    "another GPU": (plan(mask=4), "its header is for sm86, the manifest sm86, sm89"),
    "no plan": (bytes(64), "no header of a plan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_engine_that_is_another(tmp_path, name):
    data, words = WRONG[name]
    (tmp_path / "model.engine").write_bytes(data)
    sha256 = {} if name == "another byte" else {"sha256": hashlib.sha256(data).hexdigest()}
    with pytest.raises(BadInput, match=words):
        check_engine(tmp_path, report(plan()) | sha256)


def test_engine_elsewhere_or_gone(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "other").write_bytes(plan())
    with pytest.raises(BadInput, match=r"model\.engine is missing"):
        check_engine(tmp_path / "bundle", report(plan()))
    os.symlink(tmp_path / "other", tmp_path / "bundle" / "model.engine")
    with pytest.raises(BadInput, match="leads out of its directory"):
        check_engine(tmp_path / "bundle", report(plan()))
