"""What is asked of CUDA's driver to launch a kernel, by a driver that notes it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from v4export.plugins.kernels import cuda
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Launch, Typed
from v4export.plugins.kernels.names import kernels

TEXT = (
    "entry k\nthreads 64\nshared {}\nscalar i0.0\nscalar i1.1 2 *\n"
    "grid i0.0 8 cdiv\ngrid i1.0\ngrid 1\noutput float32: i0.0"
)


class Driver:
    """Succeeds, and notes calls that matter."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.attributes: list[tuple[int, int]] = []
        self.launches: list[dict[str, Any]] = []
        self.error = 0

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:
        self.loaded.append(code)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, entry: bytes) -> int:
        function._obj.value = 42
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:
        self.attributes.append((attribute, value))
        return 0

    def cuGetErrorString(self, error: int, text: Any) -> int:
        text._obj.value = b"no reason"
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *shape, stream, places, _ = rest
        kinds = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
        values = [kind.from_address(place).value for kind, place in zip(kinds, places, strict=False)]
        self.launches.append({"function": function.value, "shape": shape, "stream": stream.value, "values": values})
        return self.error


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    for function in (cuda._function, cuda._compiled):
        function.cache_clear()
    monkeypatch.setattr(cuda, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return found


def launch(shared: int, dims: dict[str, int]) -> None:
    cuda.launch_text(Launch.parse(TEXT.format(shared)), "// code", dims, [1000], [2000], 7)


def test_a_node_is_launched_as_it_says(driver: Driver) -> None:
    for _ in range(2):
        launch(128, {"i0.0": 17, "i1.0": 3, "i1.1": 5})
    assert driver.loaded == [b"// code\0"] and driver.attributes == []
    wanted = {"function": 42, "shape": [3, 3, 1, 64, 1, 1, 128], "stream": 7, "values": [1000, 17, 10, 2000]}
    assert driver.launches == [wanted, wanted]


def test_more_shared_memory_is_asked_for_once(driver: Driver) -> None:
    for _ in range(2):
        launch(PLAIN_SHARED + 16, {"i0.0": 1, "i1.0": 1, "i1.1": 1})
    assert driver.attributes == [(8, PLAIN_SHARED + 16)]


def test_an_empty_grid_is_not_launched(driver: Driver) -> None:
    launch(0, {"i0.0": 0, "i1.0": 3, "i1.1": 5})
    assert driver.launches == [] and driver.loaded == []


def test_errors_say_what_failed(driver: Driver) -> None:
    driver.error = 700
    with pytest.raises(RuntimeError, match=r"launching k on a grid of \(3, 3, 1\): CUDA error 700, no reason"):
        launch(0, {"i0.0": 17, "i1.0": 3, "i1.1": 5})


def test_a_kernel_is_compiled_for_the_gpu_at_hand(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 9}))
    constants = {"K": 2, "SCORING": "SIGMOID", "GROUPS": 1, "OPEN": 1, "BEST_TWO": 0, "NORM": 1, "SCALE": 1.0}
    operands = [Typed("float32", (None, 64)), Typed("float32", (64,))]
    compilable = kernels()["MoeRoute"].compilable(operands, constants)
    cuda.launch(compilable, (2, 1, 1), [ctypes.c_void_p(1), ctypes.c_int(2), ctypes.c_int(3), ctypes.c_void_p(4)])
    (code,) = driver.loaded
    assert code[:4] == b"\x7fELF" and driver.launches[0]["stream"] == 9
