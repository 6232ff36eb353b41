"""The C++ plugin library, beside the launches it is given as Python reads them.

Neither TensorRT's SDK nor a GPU is needed: headers, the host and CUDA's driver are stand-ins of this folder. With
TENSORRT_ROOT set, the library and its host are compiled against the SDK's headers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from v4export.plugins.kernels.emulate import compiler
from v4export.plugins.kernels.kernel import Launch, Typed
from v4export.plugins.kernels.size import Size
from v4export.plugins.moe_route.kernel import ROUTE

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
HERE = Path(__file__).with_name("library")
STAND_IN = HERE / "headers"
SOURCES = Path(__file__).resolve().parents[2] / "plugins" / "library"
SDK = os.environ.get("TENSORRT_ROOT")
PTX = "// code\n.version 8.0"
TYPES = {"float32": 0, "float16": 1, "bfloat16": 7, "int64": 8, "int32": 3, "uint8": 5, "float8_e4m3fn": 6}

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Built:
    """Paths of what was compiled."""

    library: Path
    host: Path
    driver: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("library")
    made = Built(folder / "libv4_plugins.so", folder / "host", folder / "libcuda.so.1")
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    headers = [Path(SDK), Path(SDK) / "include", cuda] if SDK else [STAND_IN]
    options = [str(compiler()), "-std=c++17", "-Wall", "-Wextra", *(f"-isystem{path}" for path in headers)]
    shared = ["-shared", "-fPIC", "-fvisibility=hidden", "-Werror"]
    commands = [
        [*options, *shared, str(SOURCES / "plugin.cpp"), "-o", str(made.library), "-ldl"],
        [*options, str(HERE / "host.cpp"), "-o", str(made.host), "-ldl"],
        [*options, *shared, "-fvisibility=default", str(HERE / "fake_cuda.cpp"), "-o", str(made.driver)],
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for one in running:
        _, said = one.communicate()
        assert one.returncode == 0, said
    return made


def hosted(
    built: Built, folder: Path, text: str, inputs: list[Dims], kinds: str = "", fails: str = ""
) -> tuple[list[str], str]:
    """What the host printed, and what went to standard error."""
    (folder / "ptx").write_text(PTX)
    (folder / "launch").write_text(text)
    dims = ["x".join(map(str, one)) for one in inputs]
    env = {"LD_LIBRARY_PATH": str(built.driver.parent), "FAKE_CUDA_PARAMETERS": kinds, "FAKE_CUDA_FAILS": fails}
    done = subprocess.run(
        [built.host, built.library, folder / "ptx", folder / "launch", *dims],
        env=os.environ | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, *others = done.stdout.splitlines()
    assert first == f"creators {(SOURCES / 'kernels.inc').read_text().count('KERNEL(')} 1 v4_kernels"
    return others, done.stderr


def wanted(launch: Launch, inputs: list[Dims]) -> list[str]:
    """What the host should print, from the launch as Python evaluates it."""
    known = {f"i{i}.{axis}": n for i, dims in enumerate(inputs) for axis, n in enumerate(dims)}
    grid = [size.evaluate(known) for size in launch.grid]
    places = [4096 * (i + 1) for i in range(len(inputs))], [65536 * (i + 1) for i in range(len(launch.outputs))]
    values = [*places[0], *(size.evaluate(known) for size in launch.scalars), *places[1]]
    numbers = " ".join(map(str, (*grid, launch.threads, 1, 1, launch.shared)))
    call = [f"launch 1 {numbers} 0x77 0", "parameters " + " ".join(map(str, values))] if all(grid) else []
    return [
        "types 0 " + " ".join(str(TYPES[dtype]) for dtype, _ in launch.outputs),
        "formats 1 0 1 0 0",
        "shapes 0",
        *(" ".join(["shape", *(str(d.evaluate(known)) for d in dims)]) for _, dims in launch.outputs),
        f"field ptx 1 {len(PTX)}",
        f"field launch 1 {len(launch.text())}",
        *("load " + PTX).splitlines(),
        f"function {launch.entry}",
        *([f"attribute 1 8 {launch.shared}"] if launch.shared > 48 << 10 else []),
        "changed 0",
        *[*call, "enqueued 0"] * 2,
        "unload 1",
    ]


def sizes(*texts: str) -> tuple[Size, ...]:
    return tuple(map(Size.parse, texts))


def route() -> Launch:
    constants = {"K": 4, "SCORING": "SIGMOID", "GROUPS": 1, "OPEN": 1, "BEST_TWO": 0, "NORM": 1, "SCALE": 2.5}
    return ROUTE.compilable([Typed("float32", (None, 16)), Typed("float32", (16,))], constants).launch


EVERY = Launch(
    "every_operator", 256, (48 << 10) + 1,
    sizes("i0.0 i1.1 +", "i0.0 1 -", "i0.0 i0.1 *", "i0.0 i1.0 min 3 max"),
    (Size.parse("i0.0 i0.1 + 4 div"), Size.parse("i1.0 i1.1 * 16 cdiv 2 max"), Size.parse("i0.0 5 min 1 max")),
    tuple(
        (dtype, sizes("i0.0 2 *", f"i0.1 {i} + 3 div", f"i1.1 {i + 1} cdiv", "i1.0 i1.1 min 7 max 1 -"))
        for i, dtype in enumerate(TYPES)
    ),
)  # fmt: skip
PLAIN = Launch("plain", 32, 48 << 10, (), (Size(3), Size(2), Size(1)), (("float16", sizes("1")),))
CASES = [
    (route(), [(7, 16), (16,)]),
    (route(), [(8, 16), (16,)]),
    (route(), [(0, 16), (16,)]),
    (EVERY, [(9, 6), (5, 13)]),
    (EVERY, [(1, 1), (1, 1)]),
    (EVERY, [(4096, 7168), (3, 129280)]),
    (PLAIN, [(2, 3, 4, 5, 6, 7, 8, 9)]),
    (PLAIN, [()] * 40),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].entry} {case[1][0]}")
def test_it_launches_what_python_would(case: tuple[Launch, list[Dims]], built: Built, tmp_path: Path) -> None:
    launch, inputs = case
    kinds = "p" * len(inputs) + "i" * len(launch.scalars) + "p" * len(launch.outputs)
    said, errors = hosted(built, tmp_path, launch.text(), inputs, kinds)
    assert errors == ""
    assert said == wanted(launch, inputs)


TEXT = route().text()
MALFORMED = {
    "nothing": "",
    "bytes": "\x01\x02\n\n ",
    "no entry": TEXT.replace("entry moe_route\n", ""),
    "an empty entry": TEXT.replace("moe_route", ""),
    "two entries": TEXT + "\nentry other",
    "threads in words": TEXT.replace("threads 128", "threads many"),
    "no threads": TEXT.replace("threads 128", "threads 0"),
    "too many threads": TEXT.replace("threads 128", "threads 1025"),
    "shared below zero": TEXT.replace("shared 0", "shared -1"),
    "shared beyond 31 bits": TEXT.replace("shared 0", "shared 2147483648"),
    "two of grid": TEXT.replace("grid 1\n", "", 1),
    "four of grid": TEXT + "\ngrid 1",
    "no output": TEXT[: TEXT.index("\noutput")],
    "an unknown type": TEXT.replace("int64:", "float128:"),
    "an output without dimensions": TEXT.replace("int64: i0.0, 4", "int64: "),
    "an output without a colon": TEXT.replace("int64: i0.0, 4", "int64"),
    "nine dimensions": TEXT.replace("int64: i0.0, 4", "int64: " + ", ".join("1" * 9)),
    "an operator too many": TEXT.replace("4 cdiv", "4 cdiv +"),
    "an operator alone": TEXT.replace("i0.0 4 cdiv", "+"),
    "a value too many": TEXT.replace("4 cdiv", "4"),
    "no value": TEXT.replace("scalar i0.0", "scalar"),
    "an unknown operator": TEXT.replace("cdiv", "mod"),
    "no axis": TEXT.replace("scalar i0.0", "scalar i0"),
    "an axis below zero": TEXT.replace("scalar i0.0", "scalar i0.-1"),
    "a number beyond 64 bits": TEXT.replace("scalar i0.0", "scalar 99999999999999999999"),
    "an unknown line": TEXT + "\ncluster 2",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_launch_is_refused(text: str, built: Built, tmp_path: Path) -> None:
    said, errors = hosted(built, tmp_path, text, [(7, 16), (16,)])
    assert said == ["refused"]
    assert errors.startswith("v4::MoeRoute: ")


UNFIT = {
    "an input too few": (route(), [], "dimension of input 0 of 0"),
    "an axis too few": (replace(PLAIN, scalars=sizes("i0.1")), [(2,)], "axis 1 of an input with 1"),
    "a division by zero": (replace(PLAIN, scalars=sizes("4 i0.0 div")), [(0,)], "a division by 0"),
    "a grid below zero": (replace(PLAIN, grid=sizes("i0.0 3 -", "1", "1")), [(2,)], "a grid of -1"),
    "a scalar beyond 32 bits": (
        replace(PLAIN, scalars=sizes("i0.0 i0.0 *")),
        [(1 << 16,)],
        "int32 parameter of 4294967296",
    ),
    "a size beyond 64 bits": (replace(PLAIN, scalars=sizes("i0.0 i0.0 *")), [(1 << 32,)], "a size beyond 64 bits"),
}


@pytest.mark.parametrize("case", UNFIT.values(), ids=UNFIT.keys())
def test_inputs_that_do_not_fit_are_refused(case: tuple[Launch, list[Dims], str], built: Built, tmp_path: Path) -> None:
    launch, inputs, message = case
    said, errors = hosted(built, tmp_path, launch.text(), inputs, "p")
    assert "enqueued 1" in said and not [line for line in said if line.startswith("launch")]
    assert message in errors


@pytest.mark.parametrize(
    "function", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"]
)
def test_an_error_of_cuda_is_said(function: str, built: Built, tmp_path: Path) -> None:
    launch = replace(PLAIN, shared=100 << 10)
    said, errors = hosted(built, tmp_path, launch.text(), [(2,)], "pp", function)
    assert said.count("enqueued 1") == 2
    assert "plain" in errors and "an illegal address" in errors
    loads = sum(line.startswith("load ") for line in said)
    failed = loads if function == "cuModuleLoadData" else 0
    assert said.count("unload 1") == loads - failed


def test_without_a_driver_types_and_shapes_are_known(built: Built, tmp_path: Path) -> None:
    away = replace(built, driver=tmp_path / "libcuda.so.1")
    said, errors = hosted(away, tmp_path, PLAIN.text(), [(2,)])
    assert "shape 1" in said and "enqueued 1" in said
    assert errors


def configured(folder: Path, *options: str) -> str:
    command = ["cmake", "-S", str(SOURCES), "-B", str(folder), *options]
    env = {k: v for k, v in os.environ.items() if k not in ("TENSORRT_ROOT", "TensorRT_ROOT")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


@needs_cmake
def test_cmake_builds_it(tmp_path: Path) -> None:
    said = configured(tmp_path, f"-DTENSORRT_ROOT={STAND_IN}", f"-DCUDA_INCLUDE_DIR={STAND_IN}")
    assert f"TensorRT's headers from {STAND_IN}" in said
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "libv4_plugins.so").exists()


@needs_cmake
def test_cmake_says_what_it_lacks(tmp_path: Path) -> None:
    said = configured(tmp_path)
    if "v4_plugins: TensorRT's headers from" in said:
        pytest.skip("an SDK is where CMake looks for it")
    assert "no NvInferRuntime.h. Set TENSORRT_ROOT" in said


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None or SDK is not None, reason="no TensorRT-RTX, or other headers")
@pytest.mark.parametrize("how", ["dlopen", "load_library"])
def test_tensorrt_rtx_builds_an_engine_with_it(how: str, built: Built, tmp_path: Path) -> None:
    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None and spec.submodule_search_locations
    shim = tmp_path / "libtensorrt_rtx.so"
    shim.symlink_to(Path(spec.submodule_search_locations[0]) / "libtensorrt_rtx.so.1")
    env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, str(HERE / "registered.py"), str(built.library), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        *(["loaded True"] if how == "load_library" else []),
        "parsed True",
        "[((-1, 4), 'FLOAT'), ((-1, 4), 'INT64')]",
        "carried True True",
    ]
