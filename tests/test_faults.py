"""Stages under injected faults: a clear error, the right exit code, no part of OUT, no process left running.

Kills and full disks at any moment, which builds go on from, are in test_resume.
"""

from __future__ import annotations

import re
import shutil
import signal
import time
from dataclasses import dataclass, replace

import psutil
import pytest
from stopping import Child, Stop, content, orphans

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.package.bundle import MANIFEST, Bundle

COUNT, NEVER = Stop("count"), 1 << 30
OPTIONS = ["--precision", "int4", "--keep", "bf16:*.self_attn.*", "--layers", "0:2", "--max-seq-len", 128]
BUILD = ["build", "hub", "-o", "out", *OPTIONS, "--no-engine"]
FILE = "out.safetensors"
#: What a calibration that was stopped leaves, from which the same command goes on.
STATE = f".{FILE}.calibration"
#: A command for each stage that reads or writes by itself, and what it makes; ``made`` is a finished bundle.
COMMANDS = {
    "build": (BUILD, "out"),
    "synth": (["synth", "tiny-v3", "-o", "out"], "out"),
    "calibrate": (["calibrate", "hub", "--text", "text", "-o", FILE, "--tokens", 64, "--context", 32], FILE),
    "package": (["package", "made", "--triton", "out"], "out"),
    "run": (["run", "made", "--prompt", "abc", "-n", 2], None),
    "verify": (["verify", "made", "--decode", 0], None),
}


@dataclass(frozen=True)
class Fault:
    """A fault at some share of a command's events: exit code, what is said, and what is left."""

    code: int
    says: str
    left: frozenset[str] = frozenset()


#: Read errors and memory leave nothing; what can be gone on with is kept where a build is stopped.
UNREADABLE = Fault(2, r"error: .*(cannot be read|cannot read|not a bundle|no weight_map)(.|\n)*Input/output error")
MEMORY = Fault(3, r"error: this machine's memory does not suffice", frozenset({".out.partial"}))
STOPPED = Fault(130, r"error: interrupted", frozenset({".out.partial"}))
FAULTS = {"unreadable": UNREADABLE, "memory": MEMORY, "terminate": STOPPED, "interrupt": STOPPED}
SHARES = (0.0, 0.5, 1.0)
KEPT = {"hub", "made", "text", "said", "events"}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def place(tmp_path_factory, traces):
    place = tmp_path_factory.mktemp("place")
    synth(replace(presets.load("tiny-v3"), intermediate_size=64, moe_intermediate_size=32), place / "hub")
    (place / "text").write_text("All human beings are born free and equal in dignity and rights. " * 20)
    assert Child(place, traces, [*BUILD[:3], "made", *BUILD[4:]], COUNT).wait() == 0
    return place


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    place = request.getfixturevalue("place")
    yield
    assert not orphans(place)
    clear(place)


def clear(place):
    for entry in (entry for entry in place.iterdir() if entry.name not in KEPT):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def left(place):
    return {entry.name for entry in place.iterdir()} - KEPT


def check(folder):
    """Prove that the bundle in a folder, if one is, is whole."""
    for manifest in folder.rglob(MANIFEST):
        Bundle.open(manifest.parent).check_files()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", COMMANDS)
def test_fault(place, traces, stage, fault):
    command, out = COMMANDS[stage]
    child = Child(place, traces, command, Stop(fault, NEVER))
    assert child.wait() == 0, child.said
    events = child.events
    if not events:
        pytest.skip(f"{stage} does nothing at which this could happen")
    wanted = FAULTS[fault]
    for share in SHARES:
        clear(place)
        child = Child(place, traces, command, Stop(fault, max(1, round(share * events))))
        assert child.wait() == wanted.code, (stage, share, child.said)
        assert re.search(wanted.says, child.said) and "Traceback" not in child.said, child.said
        if out == "out" and (place / out).exists():
            # The fault came once all was done: OUT is whole, and nothing is there to be gone on with.
            assert share == 1 and left(place) == {"out"}, (stage, share, child.said)
            check(place / out)
            continue
        assert left(place) - {STATE} <= wanted.left, (stage, share, child.said)
        assert (".out.partial" in left(place)) == ("go on with --resume" in child.said)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_earlier_bundle_stays(place, traces, fault):
    shutil.copytree(place / "made", place / "out")
    before = content(place / "out")
    child = Child(place, traces, [*BUILD, "--force"], Stop(fault, 12))
    assert child.wait() == FAULTS[fault].code, child.said
    assert content(place / "out") == before
    assert left(place) <= {"out", ".out.partial"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["short", "clock"])
def test_what_is_no_fault(place, traces, fault):
    """Writes that take a part only, and a clock that is set back by a year, change nothing."""
    child = Child(place, traces, BUILD, Stop(fault, 30))
    assert child.wait() == 0, child.said
    made, out = content(place / "made"), content(place / "out")
    for found in (made, out):
        found["v4export.json"] |= {"command": None}
        found["report.json"], found["report.html"] = None, None
    assert made == out


#: What ends the process in which TensorRT builds: as it aborts, as it segfaults, as the system frees memory.
ENDS = {
    "SIGABRT": (4, r"crashed while building the engine\n.*SIGABRT"),
    "SIGSEGV": (4, r"crashed while building the engine\n.*SIGSEGV"),
    "SIGKILL": (3, r"was killed, most likely because memory ran out"),
}


def worker(place) -> psutil.Process:
    """The process in which an engine is built, once there is one."""
    for _ in range(600):
        if found := [one for one in orphans(place) if "v4export.engine.worker" in " ".join(one.cmdline())]:
            return found[0]
        time.sleep(0.05)
    raise AssertionError("no engine was begun")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_tensorrt_ends(place, traces, name):
    pytest.importorskip("tensorrt_rtx")
    code, says = ENDS[name]
    shutil.copytree(place / "made", place / "out")
    before = {file: file.stat().st_mtime_ns for file in (place / "out").rglob("*") if file.suffix != ".onnx"}
    child = Child(place, traces, ["engine", "out", "--target", "sm89"], COUNT)
    worker(place).send_signal(getattr(signal, name))
    assert child.wait() == code, child.said
    assert re.search(says, child.said) and "Traceback" not in child.said, child.said
    assert not [*(place / "out").glob("*.engine*")]
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_tensorrt_ends_with_its_parent(place, traces, sent):
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree(place / "made", place / "out")
    child = Child(place, traces, ["engine", "out", "--target", "sm89"], COUNT)
    building = worker(place)
    psutil.Process(child.process.pid).send_signal(sent)
    assert child.wait() == (-sent if sent == signal.SIGKILL else 130), child.said
    psutil.wait_procs([building], timeout=20)
    assert not orphans(place)
    if sent != signal.SIGKILL:
        assert not [*(place / "out").glob("*.engine*")]
    Bundle.open(place / "out").check_files()
