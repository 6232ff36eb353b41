"""The C++ runner over an engine, with stand-ins for TensorRT and CUDA: what is copied, asked for and chosen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cpp_runner import compiled

from v4export.cpp.verb import write_sources

pytestmark = pytest.mark.slow

STANDINS = Path(__file__).with_name("standins")
VOCAB, RING, LIMIT, CHUNK = 32, 3, 40, 4
MODEL = f"""\
format 1
graph bundle nothing.onnx
engine 3 model.engine
vocab {VOCAB}
limit {LIMIT}
activations float32
zeros decoder_start
state float32 1 1 0 0 state.0.latent new_state.0.latent
state float32 1 1 {RING} 0 state.0.window new_state.0.window
file 5 nothing.onnx
"""


def toy(ids: list[int], count: int) -> list[int]:
    """What the stand-ins' model says: the sum of all tokens, and of those that the ring had before the step."""
    said: list[int] = []
    start = (len(ids) - 1) // CHUNK * CHUNK  # of the step that ends the prompt
    while len(said) < count:
        said.append((sum(ids) + sum(ids[max(0, start - RING) : start])) % VOCAB)
        start, ids = len(ids), [*ids, said[-1]]
    return said


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdk")
    for name in ("nvinfer", "cudart"):
        sources = [STANDINS / "standins.cpp"] if name == "nvinfer" else ["-x", "c++", "/dev/null"]
        words = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{STANDINS}", *sources, "-o", folder / f"lib{name}.so"]
        # The runner's own compilation says what is missing.
        subprocess.run([*map(str, words)], check=False)
    (folder / "project").mkdir()
    write_sources(folder / "project")
    settings = {
        "TENSORRT_INCLUDE_DIR": STANDINS,
        "CUDA_INCLUDE_DIR": STANDINS,
        "TENSORRT_LIBRARY": folder / "libnvinfer.so",
        "CUDART_LIBRARY": folder / "libcudart.so",
    }
    given = [f"-D{name}={value}" for name, value in settings.items()]
    return compiled(folder / "project", folder / "build", *given) / "v4export_run"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model.txt").write_text(MODEL)
    (tmp_path / "model.engine").write_text("toy")
    return tmp_path


def call(program: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [program, folder, "--model", folder, "--tensorrt", *arguments]
    return subprocess.run([*map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 13])
def test_tokens(program, folder, length):
    ids = [2 * n + 1 for n in range(length)]
    done = call(program, folder, "--ids", ",".join(map(str, ids)), "-n", 12)
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split(",")] == toy(ids, 12)
    # Chunks of more than one token take the second profile, everything else the first.
    chunks = [min(CHUNK, length - start) for start in range(0, length, CHUNK)] + [1] * 11
    profiles = [int(chunk > 1) for chunk in chunks]
    changes = [now for now, before in zip(profiles, [0, *profiles], strict=False) if now != before]
    assert done.stderr.splitlines() == [f"profile {number}" for number in changes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--plugins", "nowhere"], "no such library"), ([], "this is no engine")],
)
def test_refuses(program, folder, arguments, message):
    (folder / "model.engine").write_text("toy" if arguments else "boy")
    done = call(program, folder, "--ids", "1", *arguments)
    assert done.returncode == 4 and message in done.stderr


def test_refuses_another_engine(program, folder):
    (folder / "model.engine").write_text("another")
    assert "has 7 bytes, expected 3" in call(program, folder, "--ids", "1").stderr
    (folder / "model.txt").write_text(MODEL.replace("engine 3 model.engine\n", ""))
    assert "has no engine" in call(program, folder, "--ids", "1").stderr


def test_refuses_rows_of_another_type(program, folder):
    (folder / "model.txt").write_text(MODEL.replace("state float32", "state bfloat16"))
    done = call(program, folder, "--ids", "1")
    assert done.returncode == 4 and "another type in the engine" in done.stderr
