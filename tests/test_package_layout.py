"""Who imports whom, what is imported when, and how long files are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"v4export": ROOT / "v4export", "v4export.plugins": ROOT / "plugins", "v4export.graphs": ROOT / "graphs"}
FILES = {file: name for name, folder in FOLDERS.items() for file in sorted(folder.rglob("*.py"))}
#: Small modules at the top, which any room may use and which use no room.
SHARED = {
    "children",
    "config",
    "errors",
    "plain",
    "precision",
    "presets",
    "progress",
    "side_files",
    "state_contract",
    "units",
}
#: Room -> rooms it may import, directly.
MAY_IMPORT = {
    "plugins": set(),
    "checkpoint": {"engram"},
    "engram": {"checkpoint"},
    "model": {"plugins", "engram"},
    "graphs": {"model", "plugins", "checkpoint", "engram"},
    "chat": set(),
    "runtime": {"model", "graphs", "checkpoint", "engram", "chat", "engine", "plugins"},
    "engine": {"plugins"},
    "package": set(),
    "serve": {"chat", "package", "runtime"},
    "verify": {"runtime", "model", "plugins", "graphs", "checkpoint", "package", "engine", "engram"},
    "calibrate": {"checkpoint", "model", "plugins", "evaluate", "runtime"},
    "evaluate": {"checkpoint", "model", "plugins", "graphs", "runtime", "verify", "package"},
    "plan": {"checkpoint", "graphs", "engine", "opened", "package"},
    "show": {"engine", "api", "runtime", "verify", "evaluate"},
    "show_scale": {"show", "plan", "runtime"},
    "opened": {"checkpoint", "engram", "package"},
    "building": {
        "asked",
        "opened",
        "calibrate",
        "checkpoint",
        "graphs",
        "engine",
        "package",
        "plan",
        "runtime",
        "verify",
    },
    "asked": {"engine"},
    "repeating": {"asked", "building", "checkpoint", "opened", "package"},
    "bundles": {"chat", "cpp", "package", "runtime", "serve"},
    "bisect": {"building", "checkpoint", "graphs", "opened", "package", "runtime", "verify"},
    "api": {
        "bisect",
        "opened",
        "building",
        "bundles",
        "calibrate",
        "checkpoint",
        "evaluate",
        "package",
        "plan",
        "repeating",
        "runtime",
        "verify",
    },
    "cpp": {"checkpoint", "engine", "engram", "graphs", "package", "runtime"},
    "cli_bisect": {"cli_options", "api"},
    "cli_options": set(),
    "cli_package": {"cli_options", "api", "serve"},
    "cli_scale": {"cli_options", "api", "show_scale"},
    "cli": {"cli_bisect", "cli_options", "cli_package", "cli_scale", "api", "show", "engine", "verify", "package"},
}
PROJECT = ROOT / "pyproject.toml"
LATE = {"torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "transformers", "polygraphy"}


def module(file: Path) -> str:
    """A file's dotted name."""
    name = FILES[file]
    parts = file.relative_to(FOLDERS[name]).with_suffix("").parts
    return ".".join([name, *(p for p in parts if p != "__init__")])


def imports(file: Path, top_only: bool = False) -> Iterator[str]:
    """Modules that a file names in import statements, except for type checkers alone."""
    stack: list[ast.AST] = [ast.parse(file.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)) or (
            top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            continue
        stack += ast.iter_child_nodes(node)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_rooms_import_only_what_they_may():
    wrong = []
    for file in FILES:
        here = room(module(file))
        for name in imports(file):
            there = room(name)
            if not name.startswith("v4export.") or there in {here, *SHARED} or here in ("", "__init__"):
                continue
            if here in SHARED or there not in MAY_IMPORT[here]:
                wrong.append(f"{module(file)} imports {name}")
    assert not wrong


def test_every_room_is_in_the_table():
    assert {room(module(file)) for file in FILES} - {""} == SHARED | set(MAY_IMPORT)


def test_nobody_imports_the_command_line():
    assert not [file for file in FILES for name in imports(file) if re.match(r"v4export\.cli\b", name)]


def test_plugins_stand_alone():
    for file in (file for file, name in FILES.items() if name == "v4export.plugins"):
        foreign = [n for n in imports(file) if n.startswith("v4export") and not n.startswith("v4export.plugins")]
        assert not foreign, file


def test_optional_packages_are_imported_where_they_are_needed():
    for file in FILES:
        found = {name.split(".")[0] for name in imports(file)}
        assert "transformers" not in found, file
        assert not {name.split(".")[0] for name in imports(file, top_only=True)} & (LATE - {"torch"}), file


def test_the_command_line_starts_light():
    code = f"import sys, v4export.cli; print(sorted({LATE!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_nothing_optional_is_imported_with_the_api():
    code = f"import sys, v4export.api; print(sorted({LATE - {'torch'}!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short_and_know_no_machine(file):
    text = file.read_text()
    assert len(text.splitlines()) < 500
    assert not re.search(r"[\"'\s(](/home|/work|/root|/tmp|/Users|/mnt|/opt)/", text)


def test_every_folder_is_packaged():
    listed = tomllib.loads(PROJECT.read_text())["tool"]["setuptools"]["packages"]
    there = {module(file) for file in FILES if file.name == "__init__.py"} | {"v4export.graphs"}
    assert there <= set(listed)


def test_modules_of_tests_have_names_of_their_own():
    """They are imported without their folders: of two with one name, the first would be taken for both."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
