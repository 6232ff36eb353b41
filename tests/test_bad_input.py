"""Bad input through the command line: what failed, the values, what to do; the right exit code; and nothing left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from command_line import Outcome, call, start
from traced import export_bundle

from v4export import presets
from v4export.checkpoint.index import INDEX
from v4export.checkpoint.synth import synth

ROUTER = "model.layers.1.mlp.gate.weight"


class Checkpoint:
    """A checkpoint in one file or in shards, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def configure(self, **changes: object) -> None:
        file = self.folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def index(self, tensor: str, file: str) -> None:
        index = json.loads((self.folder / INDEX).read_text())
        assert tensor in index["weight_map"]
        index["weight_map"][tensor] = file
        (self.folder / INDEX).write_text(json.dumps(index))

    def header(self, change: Callable[[dict], None]) -> None:
        """Rewrite the header of the shard with the router's weight; the data stays."""
        file, header, data = self._with(ROUTER)
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def value(self, tensor: str, value: float) -> None:
        """Set one value in the middle of a bfloat16 tensor."""
        file, header, _ = self._with(tensor)
        start, end = header[tensor]["data_offsets"]
        at = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0] + (start + end) // 4 * 2
        with file.open("r+b") as stream:
            stream.seek(at)
            stream.write(np.array(value, ml_dtypes.bfloat16).tobytes())

    def _with(self, tensor: str) -> tuple[Path, dict, bytes]:
        for file in self.shards:
            data = file.read_bytes()
            size = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + size])
            if tensor in header:
                return file, header, data[8 + size :]
        raise KeyError(tensor)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return synth(presets.load("tiny-v3"), tmp_path_factory.mktemp("sound") / "sharded", shard_bytes=400_000)


@pytest.fixture
def checkpoint(sound, tmp_path) -> Checkpoint:
    return Checkpoint(Path(shutil.copytree(sound, tmp_path / "checkpoint")))


@pytest.fixture
def place(tmp_path) -> Iterator[Path]:
    """Where OUT is made; whatever the test did, nothing may be left in it."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert [p.name for p in folder.iterdir()] == []


def assert_explained(found: Outcome, *words: str, code: int = 2) -> None:
    """Three parts on stderr, no traceback, nothing on stdout."""
    assert found.code == code, (found.code, found.err)
    lines = found.err[found.err.index("error: ") :].splitlines()
    assert len(lines) >= 2 and all(line.startswith("  ") for line in lines[1:]), found.err
    assert "Traceback" not in found.err and "PASSED" not in found.out
    for word in words:
        assert word in found.err, (word, found.err)


def missing_shard(c: Checkpoint) -> None:
    c.shards[1].unlink()


def truncated_shard(c: Checkpoint) -> None:
    os.truncate(c.shards[0], c.shards[0].stat().st_size - 100)


def missing_tensor(c: Checkpoint) -> None:
    (c.folder / INDEX).unlink()
    c.header(lambda header: header.update({"model.layers.0.extra": header.pop(ROUTER)}))


def wrong_shape(c: Checkpoint) -> None:
    c.header(lambda header: header[ROUTER].update(shape=header[ROUTER]["shape"][::-1]))


def pickles_only(c: Checkpoint) -> None:
    for file in [*c.shards, c.folder / INDEX]:
        file.unlink()
    (c.folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


DAMAGE: dict[str, tuple[Callable[[Checkpoint], object], tuple[str, ...]]] = {
    "missing shard": (missing_shard, ("model-00002-of-", "Download them again")),
    "truncated shard": (truncated_shard, ("model-00001-of-",)),
    "index leads up": (lambda c: c.index(ROUTER, "../other.safetensors"), ("outside the checkpoint", "../other")),
    "index is absolute": (lambda c: c.index(ROUTER, "/etc/passwd.safetensors"), ("outside the checkpoint", ROUTER)),
    "index is not JSON": (lambda c: (c.folder / INDEX).write_text("{"), (INDEX,)),
    "wrong shape": (wrong_shape, (ROUTER, "expected [16, 96], found [96, 16]")),
    "missing and left-over tensor": (missing_tensor, (f"1 missing: {ROUTER}", "model.layers.0.extra")),
    "NaN": (lambda c: c.value(ROUTER, np.nan), ("NaN or infinity", ROUTER)),
    "infinity": (lambda c: c.value("lm_head.weight", -np.inf), ("NaN or infinity", "lm_head.weight")),
    "unknown model type": (lambda c: c.configure(model_type="llama"), ("llama", "deepseek_v3")),
    "unknown key": (lambda c: c.configure(new_attention="yes"), ("new_attention",)),
    "another number of experts": (lambda c: c.configure(n_routed_experts=32), ("missing", "experts.16")),
    "fewer layers": (lambda c: c.configure(num_hidden_layers=2), ("model.layers.2",)),
    "pickles only": (pickles_only, ("pytorch_model.bin", "safetensors")),
    "config is not JSON": (lambda c: (c.folder / "config.json").write_text("{nonsense"), ("config.json",)),
    "config is a list": (lambda c: (c.folder / "config.json").write_text("[]"), ("config.json",)),
    "no config": (lambda c: (c.folder / "config.json").unlink(), ("config.json",)),
    "no checkpoint": (lambda c: shutil.rmtree(c.folder), ("checkpoint",)),
    "a file": (lambda c: (shutil.rmtree(c.folder), c.folder.write_text("x")), ("is not a directory",)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoint(capfd, checkpoint, place, name):
    damage, words = DAMAGE[name]
    damage(checkpoint)
    assert_explained(call(capfd, "build", checkpoint.folder, "-o", place / "out", "--no-engine"), *words)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--precision", "fp4"], 2, ("unknown precision 'fp4'", "fp32, fp16, bf16, fp8")),
        (["--precision", "fp8", "--target", "a100"], 2, ("sm80", "has no fp8", "sm89")),
        (["--precision", "bf16", "--target", "t4"], 2, ("sm75", "has no bf16")),
        (["--target", "rtx409"], 2, ("rtx409", "Did you mean rtx4090")),
        (["--target", "h100", "--backend", "tensorrt_rtx"], 4, ("sm90",)),
        (["--minShapes", "nonsense"], 2, ("nonsense",)),
        (["--layers", "0:99"], 2, ("0:99", "it has 3 layers", "--layers 0:N")),
    ],
)
def test_options_that_cannot_be(capfd, sound, place, options, code, words):
    pytest.importorskip("tensorrt_rtx")
    assert_explained(call(capfd, "build", sound, "-o", place / "out", *options), *words, code=code)


@pytest.mark.slow
def test_float16_overflow(capfd, checkpoint, place):
    checkpoint.value("model.embed_tokens.weight", 1e9)
    found = call(capfd, "export", checkpoint.folder, "-o", place / "out", "--precision", "fp16")
    assert_explained(found, "model.embed_tokens.weight does not fit float16", "largest magnitude", "--precision bf16")


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_out_that_exists_and_is_no_bundle(capfd, sound, tmp_path, force, what):
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("years of work")
    found = call(capfd, "export", sound, "-o", out, *force)
    assert found.code == 2 and f"{out} exists" in found.err and "choose another -o" in found.err
    assert (out / "thesis.txt" if what == "folder" else out).read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bundle_is_replaced_only_when_asked_and_whole(capfd, sound, checkpoint, tmp_path):
    out = export_bundle(sound, tmp_path / "place" / "out", "fp32").folder
    before = (out / "v4export.json").read_bytes()
    assert_explained(call(capfd, "export", sound, "-o", out), "exists", "--force")
    checkpoint.value(ROUTER, np.nan)
    assert_explained(call(capfd, "export", checkpoint.folder, "-o", out, "--force"), "NaN")
    assert (out / "v4export.json").read_bytes() == before and [p.name for p in out.parent.iterdir()] == ["out"]


def test_out_that_cannot_be_written_beside(capfd, sound, tmp_path):
    (tmp_path / "file").write_text("")
    assert_explained(call(capfd, "export", sound, "-o", tmp_path / "file" / "out"), "cannot write to", "another -o")


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("verb", ["export", "synth"])
def test_disk_full(capfd, sound, tiny_disk, verb):
    arguments = ["export", sound, "--precision", "fp32"] if verb == "export" else ["synth", "tiny-v3"]
    assert_explained(call(capfd, *arguments, "-o", tiny_disk / "out"), str(tiny_disk), code=3)
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT"])
def test_disk_full_while_writing(capfd, sound, place, monkeypatch, number):
    import errno

    def full(*_, **__):
        raise OSError(getattr(errno, number), "no room")

    monkeypatch.setattr("v4export.graphs.export.ir.save", full)
    found = call(capfd, "export", sound, "-o", place / "out", "--precision", "fp32")
    assert_explained(found, "is full", "MiB left", "another -o", "go on with --resume", code=3)
    shutil.rmtree(place / ".out.partial")


@pytest.mark.parametrize("name", ["v4export.json", "model.cpu.onnx", "tokenizer.json"])
def test_bundle_with_a_file_missing(capfd, sound, tmp_path, name):
    out = export_bundle(sound, tmp_path / "out", "fp32").folder
    (out / name).unlink()
    assert_explained(call(capfd, "run", out, "--prompt", "x"), name.split(".")[0])


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_manifest_that_is_none(capfd, tmp_path, content):
    (tmp_path / "v4export.json").write_text(content)
    for verb in ("verify", "engine"):
        assert_explained(call(capfd, verb, tmp_path), str(tmp_path))


def line_of(process: subprocess.Popen[str], stage: str) -> None:
    """Wait for the line that ends a stage."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(stage):
            return
    raise AssertionError(f"the process ended before {stage} did")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "after"),
    [(signal.SIGINT, "audit"), (signal.SIGTERM, "graph"), (signal.SIGINT, "verify"), (signal.SIGKILL, "verify")],
)
def test_interrupted_build(sound, tmp_path, after, sent):
    """Signals during trace, verification and the engine's build, which follow those stages."""
    if after == "verify":
        pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "place" / "out"
    options = ["--precision", "fp32", "--max-seq-len", 256, *([] if after == "verify" else ["--no-engine"])]
    process = start("build", sound, "-o", out, *options)
    try:
        line_of(process, after)
        time.sleep(0.3)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    left = [p.name for p in out.parent.iterdir()]
    assert not out.exists()
    assert left == [".out.partial"]
    if sent == signal.SIGKILL:
        assert process.returncode == -sent
    else:
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
        assert "go on with --resume" in err
