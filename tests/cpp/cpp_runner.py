"""Compiles the C++ runner and calls it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from v4export import api
from v4export.package.bundle import Bundle
from v4export.runtime.tokenizer import load_tokenizer

TOOLS = ("cmake", "g++")


def library() -> Path:
    """The libonnxruntime that Python's package brings."""
    spec = importlib.util.find_spec("onnxruntime")
    places = spec.submodule_search_locations if spec else None
    found = sorted(Path(places[0], "capi").glob("libonnxruntime.so*")) if places else []
    if not found:
        pytest.skip("there is no libonnxruntime.so to run with")
    return found[0]


def compiled(source: Path, build: Path, *settings: str) -> Path:
    """The folder of what a CMake project makes; skips where compiler, CMake or onnxruntime's headers are missing."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"there is no {' and no '.join(missing)} to compile the C++ runner with")
    configured = _run("cmake", "-S", source, "-B", build, "-DCMAKE_CXX_COMPILER=g++", *settings)
    if "There is no onnxruntime_c_api.h" in configured.stderr:
        pytest.skip("there is no onnxruntime_c_api.h: install libonnxruntime-dev, or set ONNXRUNTIME_ROOT")
    assert configured.returncode == 0, configured.stderr
    made = _run("cmake", "--build", build)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "warning" not in made.stderr
    return build


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True)


def package(bundle: Bundle) -> Path:
    """A bundle's package, beside it; made once."""
    folder = bundle.folder.with_name(f"{bundle.folder.name}.cpp")
    return folder if folder.exists() else api.package_cpp(bundle.folder, folder).folder


def run(program: Path, *arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """``v4export_run ARGUMENTS``."""
    words = ["--threads", 1, "--library", library(), *arguments]
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, input=input)


def tokens(program: Path, bundle: Bundle, ids: Sequence[int], count: int) -> list[int]:
    """What the runner says after some ids, going on past the end of a text; ``program`` may be of another bundle."""
    listed = ",".join(map(str, ids))
    description = package(bundle) / "model"
    done = run(program, bundle.folder, "--model", description, "--ids", listed, "-n", count, "--ignore-eos")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [int(number) for number in done.stdout.split(",")]


def check_equal(program: Path, bundle: Bundle, prompts: Sequence[str], count: int) -> set[tuple[int, ...]]:
    """Compare with ``v4export run`` on texts. What was said."""
    said = set()
    for prompt in prompts:
        think = None if bundle.thinking is None else "off"
        wanted = api.run(
            bundle.folder, prompt=prompt, max_new_tokens=count, ignore_eos=True, threads=1, think=think
        ).tokens
        found = tokens(program, bundle, load_tokenizer(bundle.folder).encode(prompt), count)
        assert found == list(wanted), prompt
        said.add(wanted)
    return said
