"""Every kernel compiled with NVRTC, at the shapes of published models, for every kind of GPU: nothing spills."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from v4export.plugins.kernels import names, nvrtc, store
from v4export.plugins.kernels.kernel import PLAIN_SHARED, Compilable, Typed, Unfit

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
#: What a GPU gives a launch, in KiB. Ahead of time a launch has PLAIN_SHARED on each of them.
TARGETS = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120a": 99}
ROUTE = names.kernels()["MoeRoute"]
CONSTANTS = {"K": 2, "SCORING": "SIGMOID", "GROUPS": 1, "OPEN": 1, "BEST_TWO": 0, "NORM": 1, "SCALE": 1.0}


def route(experts: int = 64) -> Compilable:
    return ROUTE.compilable([Typed("float32", (None, experts)), Typed("float32", (experts,))], CONSTANTS)


def of_models(
    dtype: torch.dtype, budgets: tuple[int, ...], models: tuple[str, ...] = ()
) -> dict[str, dict[str, Compilable]]:
    """By entry point, the different ways that models compile it; all models unless some are named."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from kernel_cases import compiled
    finally:
        sys.path.remove(str(BENCHMARKS))
    found: dict[str, dict[str, Compilable]] = {}
    for _, one in compiled(budgets, dtype, models):
        found.setdefault(one.launch.entry, {})[str(one.defines)] = one
    return found


@pytest.fixture(scope="module")
def published() -> dict[str, dict[str, Compilable]]:
    return of_models(torch.bfloat16, (PLAIN_SHARED,))


def test_models_use_every_kernel(published: dict) -> None:
    """But those of experts in several stacks, and those of a variant that V4.1 alone has."""
    entries = {kernel.entry for kernel in names.kernels().values() if "In" not in kernel.name}
    assert entries - published.keys() == {"sparse_attention_since_split", "window_attention_since_split"}


def check(ways_of: dict[str, dict[str, Compilable]], target: str) -> None:
    for entry, ways in ways_of.items():
        for defines, compilable in ways.items():
            code, used = nvrtc.cubin(compilable, target)
            assert code[:4] == b"\x7fELF"
            assert used.spilled == used.stack == 0, f"{entry} {defines}: {used}"
            assert used.registers * compilable.launch.threads <= 65536
            assert used.shared + compilable.launch.shared <= 227 << 10


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str) -> None:
    check(of_models(torch.bfloat16, (PLAIN_SHARED, TARGETS[target] << 10)), target)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "target"), [(torch.float16, "sm_100a"), (torch.float32, "sm_90a")], ids=str)
def test_nothing_spills_in_other_types(dtype: torch.dtype, target: str) -> None:
    check(of_models(dtype, (227 << 10,), ("deepseek-v2-lite", "deepseek-v3", "deepseek-v4.1-flash")), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_ptx(published: dict, target: str) -> None:
    """That for Ampere, which nodes carry, is for every later GPU, too."""
    for entry, ways in published.items():
        code = nvrtc.ptx(next(iter(ways.values())), target.replace("sm", "compute"))
        assert f".visible .entry {entry}(" in code and f".target {target}" in code
    assert nvrtc.PTX_TARGET == "compute_80"


def test_parameters_are_inputs_scalars_outputs() -> None:
    """Ahead-of-time plugins pass them in that order and no others."""
    code = nvrtc.ptx(route())
    types = [line.split()[1] for line in code.splitlines() if line.strip().startswith(".param")]
    assert types == [".u64", ".u64", ".u32", ".u64", ".u64"]


def test_a_mistake_is_shown_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path))
    broken = tmp_path / "broken.cu"
    broken.write_text('extern "C" __global__ void moe_route(float* x) { y = 1; }\n')
    compilable = route()
    object.__setattr__(compilable, "kernel", type(ROUTE)(**{**vars(ROUTE), "source": broken}))
    with pytest.raises(nvrtc.CompileError, match=r'broken\.cu.*\n.*moe_route\.cu\(1\): error: identifier "y"'):
        nvrtc.ptx(compilable)


def test_code_is_kept_and_taken_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path))
    first = nvrtc.cubin(route(), "sm_80")
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.cubin(route(), "sm_80") == first
    with pytest.raises(TypeError):
        nvrtc.cubin(route(experts=96), "sm_80")


def test_a_launch_that_needs_too_much_is_refused() -> None:
    wide = type(ROUTE)(**{**vars(ROUTE), "shared": lambda _: 1 << 20})
    with pytest.raises(Unfit, match="1048576 bytes of shared memory"):
        wide.compilable([Typed("float32", (None, 64)), Typed("float32", (64,))], CONSTANTS)


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("V4EXPORT_CACHE", str(tmp_path / "file" / "below"))
    assert nvrtc.cubin(route(experts=32), "sm_80")[0][:4] == b"\x7fELF"
    assert store.folder().is_dir() and tmp_path not in store.folder().parents
