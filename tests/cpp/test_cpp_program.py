"""The C++ runner as a program: what it says, what it refuses, and that it touches no memory but its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_runner import compiled, library, package, run, tokens
from small_models import small

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.cpp.describe import describe
from v4export.package.bundle import Bundle

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs" / "cpp.md"


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return tiny_bundle("fp32")


@pytest.fixture(scope="module")
def program(bundle, tmp_path_factory) -> Path:
    return compiled(package(bundle), tmp_path_factory.mktemp("cpp") / "build") / "v4export_run"


@pytest.fixture
def changed(bundle, tmp_path) -> tuple[Path, Path]:
    """A bundle and its model's folder, to be spoilt: copies."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    shutil.copytree(package(bundle) / "model", tmp_path / "model")
    return tmp_path / "bundle", tmp_path / "model"


def test_program_stops_where_a_text_ends(program, bundle, tmp_path):
    said = tokens(program, bundle, [3, 4], 8)
    folder = tmp_path / "model"
    folder.mkdir()
    stop = said[3]
    (folder / "model.txt").write_bytes(describe(bundle, [stop], {})["model.txt"])
    done = run(program, bundle.folder, "--model", folder, "--ids", "3,4", "-n", 8, "--stats")
    assert [int(n) for n in done.stdout.split(",")] == said[: said.index(stop) + 1]
    assert re.match(r"onnxruntime 1\.\d+\.\d+.*; opened in [\d.]+ s; 2 prompt tokens", done.stderr)
    assert re.search(r"^stop; state [\d.]+ MiB; peak memory \d+ MiB$", done.stderr, re.MULTILINE)


def test_program_fills_the_state_and_no_more(program, bundle):
    said = tokens(program, bundle, [9] * 1020, 100)
    assert len(said) == 5
    done = run(program, bundle.folder, "--ids", ",".join(["9"] * 1025), "--model", package(bundle) / "model")
    assert done.returncode == 2 and "longer than the model was built for" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--ids", "1,x"], 2, "x is not a number"), (["--ids", ""], 2, "--ids are needed"), (["--ids"], 2, "a value"),
        (["--ids", "320"], 2, "not in the vocabulary"), (["--ids", "1", "-n", "0"], 2, "0 is not a number"),
        (["--ids", "1", "--nonsense"], 2, "--nonsense"), (["--ids", "1", "more"], 2, "more"),
        (["--ids", "1", "--library", "nowhere.so"], 4, "onnxruntime cannot be loaded"),
        (["--ids", "1", "--library", "libdl.so.2"], 4, "no OrtGetApiBase"),
        (["--ids", "1", "--model", "nowhere"], 2, "there is no folder"),
    ],
)  # fmt: skip
def test_program_refuses(program, bundle, arguments, code, message):
    done = run(program, bundle.folder, *arguments)
    assert done.returncode == code and message in done.stderr and done.stdout == ""


def spoil(name):
    """Changes of a bundle and its model's folder, by the message that they lead to."""

    def shorter(bundle, model):
        os.truncate(bundle / "model.cpu.onnx", 100)

    def missing(bundle, model):
        (bundle / "model.cpu.onnx").unlink()

    def linked(bundle, model):
        (bundle / "model.cpu.onnx").rename(bundle.with_name("elsewhere"))
        (bundle / "model.cpu.onnx").symlink_to(bundle.with_name("elsewhere"))

    def outside(bundle, model):
        (bundle.parent / "beside").write_text("")
        with (model / "model.txt").open("a") as text:
            text.write("file 0 ../beside\n")

    def absolute(bundle, model):
        with (model / "model.txt").open("a") as text:
            text.write(f"file 0 {bundle / 'model.cpu.onnx'}\n")

    def unknown(bundle, model):
        with (model / "model.txt").open("a") as text:
            text.write("think 3\n")

    def negative(bundle, model):
        with (model / "model.txt").open("a") as text:
            text.write("state float32 0 1 0 0 a b\n")

    def later(bundle, model):
        text = (model / "model.txt").read_text()
        (model / "model.txt").write_text(text.replace("format 1", "format 2"))

    def half(bundle, model):
        (model / "model.txt").write_text("format 1\n")

    return locals()[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shorter", "not the bundle that was packaged"), ("missing", "a file is missing"), ("linked", "leads out"),
        ("outside", "leads out"), ("absolute", "leads out"), ("unknown", "think 3: nobody knows"),
        ("negative", "0 is less than 1"), ("later", "this reads format 1"), ("half", "is not whole"),
    ],
)  # fmt: skip
def test_program_refuses_what_has_changed(program, changed, name, message):
    spoil(name)(*changed)
    done = run(program, changed[0], "--model", changed[1], "--ids", "1")
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""


def test_program_reads_ids_from_its_input(program, bundle):
    done = run(program, bundle.folder, "--model", package(bundle) / "model", "--ids", "-", "-n", 8, input="3, 4\n")
    assert [int(n) for n in done.stdout.split(",")] == tokens(program, bundle, [3, 4], 8)[: done.stdout.count(",") + 1]
    assert run(program, bundle.folder, "--ids", "-", input="").returncode == 2


def test_program_without_tensorrt_says_so(program, changed):
    bundle, model = changed
    assert "has no engine" in run(program, bundle, "--model", model, "--ids", "1", "--tensorrt").stderr
    (bundle / "model.engine").write_text("engine")
    with (model / "model.txt").open("a") as text:
        text.write("engine 6 model.engine\n")
    done = run(program, bundle, "--model", model, "--ids", "1", "--tensorrt")
    assert done.returncode == 4 and "compiled without TensorRT" in done.stderr and done.stdout == ""


def test_program_finds_the_library_by_the_environment(program, bundle):
    environment = {**os.environ, "V4EXPORT_ONNXRUNTIME": str(library())}
    done = subprocess.run([program, bundle.folder, "--ids", "3", "-n", "2"], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b",") == 1, done.stderr


def test_sanitizers_find_nothing(program, tmp_path):
    """Over rings, entries of two lengths, and look-ups."""
    checkpoint = synth(small("tiny-v4.1"), tmp_path / "hub")
    bundle = api.export(checkpoint, tmp_path / "out", precision="bf16", max_seq_len=1024).bundle
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    settings = (f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    checked = compiled(package(bundle), tmp_path / "build", *settings) / "v4export_run"
    ids = [3 + n * n % 300 for n in range(600)]
    assert tokens(checked, bundle, ids, 24) == tokens(program, bundle, ids, 24)
    assert run(checked, bundle.folder, "--ids", "1,400").returncode == 2


def test_example_of_the_documents(bundle, program, tmp_path):
    (source,) = re.findall(r"^```cpp\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (project,) = re.findall(r"^```cmake\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "main.cpp").write_text(source)
    (tmp_path / "CMakeLists.txt").write_text(project)
    (tmp_path / "runner").symlink_to(package(bundle))
    example = compiled(tmp_path, tmp_path / "build") / "example"
    environment = {**os.environ, "V4EXPORT_ONNXRUNTIME": str(library())}
    done = subprocess.run([example, bundle.folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(n) for n in done.stdout.split()] == tokens(program, bundle, [1, 2, 3], 16)
