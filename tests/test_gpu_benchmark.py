"""The benchmark of kernels without its GPU: operands, floors and tables, with a timer that has an answer ready."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from v4export import presets
from v4export.plugins.kernels.call import Recorder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
try:
    import gpu_floors
    import gpu_kernels
    import gpu_shapes
    import gpu_timing
    import page
    from kernel_cases import MODELS, OP, cases, step_of
finally:
    del sys.path[0]

RATES = gpu_kernels.Rates(bandwidth=3e12, matrix=8e14, launch=1e-6)


class Ready:
    """Runs each call once and says ten microseconds."""

    l2 = 50 << 20

    def seconds(self, calls: Sequence[Callable[[], object]], graphed: bool = True) -> float:
        calls[0]()
        return 1e-5

    def copy_bandwidth(self) -> float:
        return RATES.bandwidth

    def matrix_rate(self) -> float:
        return RATES.matrix

    def empty(self) -> float:
        return RATES.launch


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> gpu_kernels.Bench:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return gpu_kernels.Bench(Ready(), "meta", 60.0)


@pytest.mark.parametrize("quick", [True, False])
def test_every_row_is_measured_and_written(bench: gpu_kernels.Bench, quick: bool, tmp_path: Path) -> None:
    wanted = list(gpu_shapes.rows(quick))
    found = bench.measure(wanted)
    assert [one.row for one in found] == wanted
    without = {one.row.op for one in found if gpu_kernels.EAGER not in one.others}
    assert without <= {"moe_experts"}  # whose experts nobody can name without numbers
    tables = gpu_kernels.tables(found, bench.rates())
    assert sum(table.count("\n") - 1 for table in tables) == len(wanted)
    into = tmp_path / "page.md"
    into.write_text(f"before\n{gpu_kernels.BEGIN}\nold\n{gpu_kernels.END}\nafter\n")
    page.replace_between(into, gpu_kernels.BEGIN, gpu_kernels.END, tables)
    text = into.read_text()
    assert "old" not in text and all(table in text for table in tables) and text.endswith("after\n")
    json.dumps([asdict(one) for one in found])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = gpu_kernels.Bench
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_kernels, "Bench", lambda timer, _, seconds: real(timer, "meta", seconds))
    monkeypatch.setattr(gpu_timing, "Timer", Ready)
    monkeypatch.setattr(gpu_timing, "machine", lambda: "a GPU")
    into, written = tmp_path / "page.md", tmp_path / "found.json"
    into.write_text(page.PAGE.read_text())
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        done = CliRunner().invoke(gpu_kernels.main, ["--quick", "--json", str(written), "--into", str(into)])
    assert done.exit_code == 0, done.output
    assert "a GPU. Copy 3.00 TB/s, bfloat16 products 800 TFLOP/s, a launch that does nothing 1.0 us" in into.read_text()
    assert len(json.loads(written.read_text())["rows"]) == len(list(gpu_shapes.rows(True)))


class Counted:
    """A GPU whose clock is a number of calls: one takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.at, self.recorded = seconds, 0.0, 0

    def call(self) -> None:
        self.at += self.seconds

    def between(self, *calls: Callable[[], object]) -> float:
        start = self.at
        for one in calls:
            one()
        return self.at - start


class Graph:
    """Replays what was called in it."""

    gpu: Counted

    def __enter__(self) -> None:
        self.start = self.gpu.at

    def __exit__(self, *_: object) -> None:
        self.taken, self.gpu.at = self.gpu.at - self.start, self.start
        self.gpu.recorded += 1

    def replay(self) -> None:
        self.gpu.at += self.taken


@pytest.mark.parametrize(("seconds", "graphed", "graphs"), [(3e-6, True, 1), (3e-6, False, 0), (1e-2, True, 1)])
def test_the_time_of_a_call(seconds: float, graphed: bool, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Graph.gpu = Counted(seconds)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    timer = object.__new__(gpu_timing.Timer)
    monkeypatch.setattr(timer, "_between", gpu.between, raising=False)
    assert timer.seconds([gpu.call] * 3, graphed) == pytest.approx(seconds)
    assert gpu.recorded == graphs


def test_the_page_has_a_place_for_them() -> None:
    text = page.PAGE.read_text()
    assert text.index(gpu_kernels.BEGIN) < text.index(gpu_kernels.END)


def test_a_line() -> None:
    row = gpu_shapes.Row("T", "deepseek-v3", "moe_route", "", 16)
    one = gpu_kernels.Found(row, gpu_floors.Work(3e6), 4e-6, {gpu_kernels.EAGER: 2.5e-4})
    line = gpu_kernels.table("T", [one], RATES).splitlines()[-1]
    assert line == "| deepseek-v3 | 16 |  | 4.0 | 3.0 | 1.0 | memory | 25% | 250 | - | - |"


def test_when_time_is_up_kernels_are_still_measured(bench: gpu_kernels.Bench) -> None:
    bench.seconds = -1.0
    found = bench.measure(list(gpu_shapes.rows(True)))
    assert len(found) == len(list(gpu_shapes.rows(True))) and not any(one.others for one in found)


def test_what_does_not_fit_is_left_out(bench: gpu_kernels.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("so many GiB")

    monkeypatch.setattr(bench.timer, "seconds", full, raising=False)
    assert bench.measure(list(gpu_shapes.rows(True))) == []


def work(op: str, model: str, sequences: int, held: int) -> gpu_floors.Work:
    row = gpu_shapes.Row("", model, op, "", sequences, held, MODELS[model])
    return gpu_floors.work(op, row.operands("meta"))


def test_floors_of_attention() -> None:
    """DeepSeek-V3 reads 1152 bytes of a row and does 278,528 operations; V4-Flash's CSA reads 128 + 512 rows of 512."""
    one, more = (work("latent_attention", "deepseek-v3", 4, held) for held in (1000, 2000))
    assert (more.moved - one.moved) / 4000 == 1152 and (more.operations - one.operations) / 4000 == 278_528
    sparse = work("sparse_attention", "deepseek-v4-flash", 1, 8192)
    assert sparse.moved == 2 * 512 * (640 + 2 * 64) + 8 * 512
    assert work("sparse_attention", "deepseek-v4-flash", 1, 65536) == sparse


def test_floors_of_experts() -> None:
    """A token of DeepSeek-V3 hits 8 experts of 44 MB; 256 tokens hit all but a few."""
    one, many = (work("moe_experts", "deepseek-v3", tokens, 1) for tokens in (1, 256))
    assert one.moved == pytest.approx(8 * 3 * 2048 * 7168, rel=2e-3)
    assert 0.99 < many.moved / (256 * 3 * 2048 * 7168) < 1.01
    assert one.operations == 8 * 6 * 2048 * 7168
    assert one.floor(4e12, 1e15)[1] == "memory" and many.floor(1e20, 1e15)[1] == "matrix"


def test_experts_that_tokens_share_are_read_once() -> None:
    config = replace(presets.load("deepseek-v4-flash"), num_experts=8, hidden_size=64, moe_intermediate_size=32)
    step = gpu_shapes.Operands(config, "fp4", 5, 1, "cpu")
    (args,) = gpu_shapes._CASES["moe_experts"](step)
    indices = torch.arange(6).expand(5, 6)
    same = gpu_floors.work("moe_experts", (*args[:2], indices, *args[3:])).moved
    other = gpu_floors.work("moe_experts", (*args[:2], (indices + torch.arange(5)[:, None]) % 8, *args[3:])).moved
    assert other - same == 2 * 3 * (64 * 32 // 2 + 64 * 32 // 32 * 2)


@pytest.mark.parametrize("model", MODELS)
def test_every_op_has_a_floor(model: str) -> None:
    for case in cases(model, step_of(model)):
        assert gpu_floors.work(case.op, case.args).moved > 0


@pytest.mark.parametrize(("l2", "shared"), [(1 << 20, True), (50 << 20, False)])
def test_other_numbers_are_chosen_from_a_large_cache_and_small_ones_copied(l2: int, shared: bool) -> None:
    row = gpu_shapes.Row("", "deepseek-v4-flash", "sparse_attention", "", 2, 8192)
    args = row.operands("cpu")
    one, two, *rest = gpu_shapes.in_turn("sparse_attention", args, gpu_floors.work("sparse_attention", args).moved, l2)
    assert len(rest) == (0 if shared else 30)
    assert (one[4] is two[4]) == shared and torch.equal(one[5], two[5]) != shared
    assert two[5].min() >= 0 and two[5].max() < 2048 and len(set(two[5][0].tolist())) == 512


def test_what_has_no_choice_is_copied() -> None:
    args = gpu_shapes.Row("", "deepseek-v4-flash", "hyper_mix", "", 2).operands("cpu")
    turns = gpu_shapes.in_turn("hyper_mix", args, 1e6, 3 << 20)
    assert len(turns) == 10 and len({one[0].data_ptr() for one in turns}) == 10
    assert all(torch.equal(one[0], args[0]) for one in turns)


def test_the_empty_kernel_can_be_compiled() -> None:
    recorder = Recorder()
    recorder(gpu_timing.EMPTY, torch.empty(1, dtype=torch.int32, device="meta"))
    (compilable,) = recorder.compiled
    from v4export.plugins.kernels import nvrtc

    assert nvrtc.cubin(compilable, "sm_90a")[0][:4] == b"\x7fELF"


def test_every_measured_op_is_an_op() -> None:
    assert {row.op for row in gpu_shapes.rows(False)} <= OP.keys()
