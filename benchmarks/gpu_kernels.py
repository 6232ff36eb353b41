"""Kernels on the GPU at hand: how close they come to what memory and matrix units allow, and what PyTorch makes of it.

Measures a copy and a product of matrices first. Everything is replayed from CUDA graphs with operands that no cache
holds, but for what waits for the GPU in between. Needs a GPU that does nothing else.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from gpu_floors import Work, work
from gpu_shapes import Row, forget, in_turn, rows
from kernel_cases import OP
from page import PAGE, replace_between, row

from v4export.plugins.kernels.kernel import Unfit
from v4export.plugins.kernels.on_cuda import eager

BEGIN, END = "<!-- measured: gpu kernels -->", "<!-- end: gpu kernels -->"
#: Seconds after which nothing is compared any more, and of them those in which PyTorch may compile.
SECONDS, QUICK_SECONDS, COMPILING = 400.0, 90.0, 0.85
#: Ops whose reference asks the GPU which experts were chosen: no graph holds it, and each choice is compiled anew.
WAITS = ("moe_experts",)
EAGER, COMPILED, TRITON = "PyTorch eager", "torch.compile", "Triton"


class Clock(Protocol):
    """What ``gpu_timing.Timer`` is, and a test's timer, too."""

    l2: int

    def seconds(self, calls: Sequence[Callable[[], object]], graphed: bool = True) -> float: ...
    def copy_bandwidth(self) -> float: ...
    def matrix_rate(self) -> float: ...
    def empty(self) -> float: ...


@dataclass
class Found:
    """What was measured of one row; seconds.

    Attributes:
        row: its shape.
        work: what it has to move and to compute.
        kernel: of the kernels.
        others: of what they are compared with, where it ran.
    """

    row: Row
    work: Work
    kernel: float
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """Of the GPU: bytes and operations a second, and seconds of a launch that does nothing."""

    bandwidth: float
    matrix: float
    launch: float


class Bench:
    """Measures rows.

    Args:
        timer: of calls.
        device: of operands.
        seconds: after which nothing is compared any more.
    """

    def __init__(self, timer: Clock, device: str, seconds: float) -> None:
        self.timer, self.device, self.seconds = timer, device, seconds
        self.start = time.monotonic()
        self.compiled: dict[str, Callable[..., Any]] = {}

    def within(self, share: float) -> bool:
        """Whether less than that share of the time has gone by."""
        return time.monotonic() - self.start < share * self.seconds

    def rates(self) -> Rates:
        """Of the GPU as it is now."""
        return Rates(self.timer.copy_bandwidth(), self.timer.matrix_rate(), self.timer.empty())

    def measure(self, wanted: Sequence[Row]) -> list[Found]:
        """Kernels, eager references and Triton's of every row; then what PyTorch compiles, a row of each op in turn."""
        found = [one for one in map(self.first, wanted) if one]
        forget()
        for one in one_of_each(found):
            if self.within(COMPILING):
                self.compare(one, COMPILED, self.operands(one), self._compiled)
        return found

    def first(self, shape: Row) -> Found | None:
        """Without what has to be compiled; None where it does not fit in memory or in a launch."""
        release()
        try:
            args = shape.operands(self.device)
            todo = work(shape.op, args)
            turns = in_turn(shape.op, args, todo.moved, self.timer.l2)
            found = Found(shape, todo, self.timer.seconds(calls(OP[shape.op].torch_op, turns)))
        except (torch.OutOfMemoryError, Unfit) as reason:
            click.echo(f"{named(shape)}: left out, {first_line(reason)}", err=True)
            return None
        click.echo(f"{named(shape)}: {1e6 * found.kernel:.1f} us", err=True)
        if self.within(1.0):
            self.compare(found, EAGER, turns, lambda one: [self.reference(one.op)])
            self.compare(found, TRITON, turns, in_triton)
        return found

    def operands(self, found: Found) -> list[tuple[Any, ...]]:
        """Made again."""
        release()
        try:
            return in_turn(found.row.op, found.row.operands(self.device), found.work.moved, self.timer.l2)
        except torch.OutOfMemoryError:
            return []

    def compare(
        self,
        found: Found,
        column: str,
        turns: Sequence[tuple[Any, ...]],
        ways: Callable[[Row], Sequence[Callable[..., Any]]],
    ) -> None:
        """Note the fastest of some ways to compute the same; whatever fails is left out."""
        graphed = found.row.op not in WAITS
        for way in ways(found.row) if turns else ():
            try:
                taken = self.timer.seconds(calls(way, turns), graphed)
                found.others[column] = min(taken, found.others.get(column, taken))
            except Exception as reason:  # whatever another's compiler or memory did: the row stays without it
                click.echo(f"{named(found.row)}, {column}: {first_line(reason)}", err=True)

    def reference(self, op: str) -> Callable[..., Any]:
        """The op without kernels; what it makes anew is on the GPU."""
        plain = eager(OP[op].torch_op)

        def there(*args: Any) -> Any:
            with torch.device(self.device):
                return plain(*args)

        return there

    def _compiled(self, shape: Row) -> list[Callable[..., Any]]:
        """One for all shapes of an op, so that PyTorch can leave dimensions open."""
        if shape.op in WAITS:
            return []
        if shape.op not in self.compiled:
            self.compiled[shape.op] = torch.compile(self.reference(shape.op))
        return [self.compiled[shape.op]]


def calls(function: Callable[..., Any], turns: Sequence[tuple[Any, ...]]) -> list[Callable[[], object]]:
    """Calls with each operands."""
    return [functools.partial(function, *args) for args in turns]


def in_triton(shape: Row) -> list[Callable[..., Any]]:
    """The op in Triton's language, in each of its tiles; nothing where there is none, or no Triton."""
    if shape.op not in ("latent_attention", "moe_route"):
        return []
    try:
        import triton_kernels
    except ImportError:
        return []
    if shape.op == "moe_route":
        return [triton_kernels.moe_route]
    return [functools.partial(triton_kernels.latent_attention, tile=tile) for tile in triton_kernels.TILES]


def one_of_each(found: Sequence[Found]) -> Iterator[Found]:
    """The first of every op, then the second, and so on."""
    by_op: dict[tuple[str, str], list[Found]] = {}
    for one in found:
        by_op.setdefault((one.row.model, one.row.what or one.row.op), []).append(one)
    for place in range(max(map(len, by_op.values()), default=0)):
        yield from (some[place] for some in by_op.values() if place < len(some))


def release() -> None:
    """Give memory back, so that the next row has all of it in one piece."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(reason: BaseException) -> str:
    said = [line for line in str(reason).splitlines() if line.strip()][:3]
    return " ".join([f"{type(reason).__name__}:", *(line[:400] for line in said)])


def named(shape: Row) -> str:
    cached = f" over {shape.held}" if shape.held else ""
    return " ".join(filter(None, (shape.model, shape.op, shape.what, f"{shape.sequences}{cached}")))


def tables(found: Sequence[Found], rates: Rates) -> list[str]:
    """A table of each kind of op."""
    by_title: dict[str, list[Found]] = {}
    for one in found:
        by_title.setdefault(one.row.table, []).append(one)
    return [table(title, some, rates) for title, some in by_title.items()]


def table(title: str, found: Sequence[Found], rates: Rates) -> str:
    heads = (
        title, "tokens", "cached", "kernels, us", "above a launch", "floor, us", "binds", "floor / kernels",
        f"{EAGER}, us", f"{COMPILED}, us", f"{TRITON}, us",
    )  # fmt: skip
    lines = [row(*heads), row(*["---"] * len(heads))]
    for one in found:
        floor, binds = one.work.floor(rates.bandwidth, rates.matrix)
        shape = one.row
        lines.append(
            row(
                f"{shape.model} {shape.what}".strip(), f"{shape.sequences}", f"{shape.held:,}" if shape.held else "",
                us(one.kernel), us(one.kernel - rates.launch), us(floor), binds, f"{100 * floor / one.kernel:.0f}%",
                *(us(one.others.get(column)) for column in (EAGER, COMPILED, TRITON)),
            )
        )  # fmt: skip
    return "\n".join(lines)


def us(seconds: float | None) -> str:
    """Microseconds, to three digits or a tenth."""
    if seconds is None:
        return "-"
    return f"{1e6 * seconds:,.1f}" if abs(seconds) < 1e-4 else f"{1e6 * seconds:,.0f}"


def note(machine: str, rates: Rates, command: str) -> str:
    return (
        f"{machine}. Copy {rates.bandwidth / 1e12:.2f} TB/s, bfloat16 products {rates.matrix / 1e12:.0f} TFLOP/s, "
        f"a launch that does nothing {us(rates.launch)} us; medians of 5; `{command}`."
    )


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A few shapes of each op.")
@click.option("--seconds", type=float, default=SECONDS, show_default=True, help="After them nothing is compared.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write what was measured there.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(quick: bool, seconds: float, json_path: Path | None, into: Path) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("PyTorch finds no CUDA device")
    from gpu_timing import Timer, machine

    # For all shapes of an op; beyond it PyTorch would run the reference as it is and not say so.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    bench = Bench(Timer(), "cuda", QUICK_SECONDS if quick else seconds)
    rates, found = bench.rates(), bench.measure(list(rows(quick)))
    command = " ".join(["python", "benchmarks/gpu_kernels.py", *sys.argv[1:]])
    written = [note(machine(), rates, command), *tables(found, rates)]
    replace_between(into, BEGIN, END, written)
    if json_path:
        facts = {"machine": machine(), "command": command, "rates": asdict(rates)}
        json_path.write_text(json.dumps(facts | {"rows": [asdict(one) for one in found]}, indent=1))
    click.echo("\n\n".join(written))


if __name__ == "__main__":
    main()
