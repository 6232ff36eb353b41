"""A build that is killed at any moment goes on where it was, and leaves what one leaves that nobody disturbs."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
from stopping import Child, Stop, content

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.checkpoint.tensor import read_header
from v4export.package.bundle import Bundle

KILLS, FULL = 20, 10
#: Converted weights, integers once more for a CPU, graphs, a verdict.
OPTIONS = ["--precision", "int4", "--keep", "bf16:*.self_attn.*", "--layers", "0:2", "--max-seq-len", 128]
COMMAND = ["build", "hub", "-o", "out", *OPTIONS, "--no-engine"]
COUNT = Stop("count")


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    synth(replace(presets.load("tiny-v3"), intermediate_size=64, moe_intermediate_size=32), place / "hub")
    return place


@pytest.fixture(scope="module")
def undisturbed(place, traces):
    """How many events and seconds a build takes, and what it leaves."""
    assert Child(place, traces, COMMAND, COUNT).wait() == 0  # which traces
    shutil.rmtree(place / "out")
    child, start = Child(place, traces, COMMAND, COUNT), time.monotonic()
    assert child.wait() == 0, child.said
    found = child.events, time.monotonic() - start, content(place / "out")
    shutil.rmtree(place / "out")
    return found


def left(place):
    return {p.name for p in place.iterdir()} - {"hub", "said", "events"}


@pytest.mark.slow
def test_killed_at_any_moment(place, traces, undisturbed):
    events, seconds, wanted = undisturbed
    rng, kills, resume = random.Random(7), 0, []
    while kills < KILLS or resume:
        stop, after = COUNT, None
        if kills < KILLS and kills % 3 == 0:
            after = rng.uniform(0, seconds)
        elif kills < KILLS:
            # What is left to do gets less.
            stop = Stop("kill", rng.randint(1, events // 3 if resume else events))
        child = Child(place, traces, [*COMMAND, *resume], stop)
        code = child.wait(after)
        assert code in (0, -signal.SIGKILL), child.said
        assert left(place) <= {"out", ".out.partial"}
        kills += code != 0
        resume = [] if (place / "out").exists() else ["--resume"]
        if not resume:
            assert content(place / "out") == wanted
            shutil.rmtree(place / "out")
            assert code or left(place) == set()


@pytest.mark.slow
def test_a_byte_that_has_changed_is_made_anew(place, traces, undisturbed):
    events, _, wanted = undisturbed
    assert Child(place, traces, COMMAND, Stop("kill", events - 8)).wait() == -signal.SIGKILL
    partial = place / ".out.partial"
    for name in ("weights/converted-00001.safetensors", "weights/cpu-00001.safetensors", "model.onnx"):
        flip(partial / "result" / name)
    with open(partial / "journal", "ab") as journal:
        journal.write(b'{"name": "verification", "key": "')
    child = Child(place, traces, [*COMMAND, "--resume"], COUNT)
    assert child.wait() == 0, child.said
    # What is made anew is what it was, so that the verdict about it stands.
    assert "going on with .out.partial" in child.said
    assert [line.split()[0] for line in child.said.splitlines() if line.endswith("before")] == ["verify"]
    assert content(place / "out") == wanted
    shutil.rmtree(place / "out")


@pytest.mark.slow
def test_a_byte_of_the_checkpoint_that_has_changed(place, traces, undisturbed):
    """Under the same header and time."""
    events, _, wanted = undisturbed
    assert Child(place, traces, COMMAND, Stop("kill", events - 8)).wait() == -signal.SIGKILL
    shutil.copytree(place / "hub", place / "kept")
    file = place / "hub" / "model.safetensors"
    expert = read_header(file)[1]["model.layers.1.mlp.experts.0.down_proj.weight"]
    flip(file, expert.offset)
    assert Child(place, traces, [*COMMAND, "--resume"], COUNT).wait() == 0
    resumed = content(place / "out")
    shutil.rmtree(place / "out")
    assert Child(place, traces, COMMAND, COUNT).wait() == 0
    assert resumed == content(place / "out") != wanted
    shutil.rmtree(place / "out")
    shutil.rmtree(place / "hub")
    (place / "kept").rename(place / "hub")


def flip(file, at=-1):
    """Turn over a bit of a file, whose time stays what it was."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.slow
def test_another_recipe_takes_what_it_has_in_common(place, traces):
    command = ["export", "hub", "-o", "out", *OPTIONS]
    assert Child(place, traces, [*command, "--no-cpu-weights"], COUNT).wait() == 0
    wanted = content(place / "out")
    shutil.rmtree(place / "out")
    assert Child(place, traces, command, Stop("kill", 110)).wait() == -signal.SIGKILL
    child = Child(place, traces, [*command, "--no-cpu-weights", "--resume"], COUNT)
    journal = (place / ".out.partial" / "journal").read_text()
    assert child.wait() == 0, child.said
    assert "cpu-00001" in journal and not list((place / "out").rglob("cpu-*"))
    assert content(place / "out") == wanted
    shutil.rmtree(place / "out")


@pytest.mark.slow
def test_disk_full_at_any_moment(place, traces):
    command = ["export", "hub", "-o", "out", *OPTIONS]
    child = Child(place, traces, command, Stop("full", 1 << 30))
    assert child.wait() == 0, child.said
    writes, wanted = child.events, content(place / "out")
    shutil.rmtree(place / "out")
    for number in random.Random(3).sample(range(1, writes + 1), FULL):
        child = Child(place, traces, command, Stop("full", number))
        assert child.wait() == 3, child.said
        assert re.search(r"error: the disk of . is full\n +\d+ MiB left", child.said), child.said
        assert "go on with --resume, or start anew without" in child.said and "Traceback" not in child.said
        assert left(place) == {".out.partial"} and not list((place / ".out.partial").glob("unfinished*"))
        child = Child(place, traces, [*command, "--resume"], COUNT)
        assert child.wait() == 0, child.said
        assert left(place) == {"out"} and content(place / "out") == wanted
        shutil.rmtree(place / "out")


@pytest.mark.slow
def test_killed_while_an_engine_is_built(place, traces):
    pytest.importorskip("tensorrt_rtx")
    command = [*COMMAND[:-1], "--target", "sm89"]
    child = Child(place, traces, command, COUNT)
    while "\nverify " not in child.said:
        time.sleep(0.1)
    assert child.wait(1.0) == -signal.SIGKILL
    child = Child(place, traces, [*command, "--resume"], COUNT)
    assert child.wait() == 0, child.said
    taken = [line.split()[0] for line in child.said.splitlines() if line.endswith("before")]
    assert taken == ["graph", "weights", "verify"]
    Bundle.open(place / "out").check_files()
    resumed = content(place / "out")
    shutil.rmtree(place / "out")
    assert Child(place, traces, command, COUNT).wait() == 0
    assert resumed == content(place / "out")
    shutil.rmtree(place / "out")
