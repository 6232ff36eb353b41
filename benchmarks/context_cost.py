"""What a decoded token costs as its past grows, of whole models in V3's, V4's and V4.1's layout, on a CPU: a chart.

Needs 15 GB of disk, 10 GB of memory, and a machine that does nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
from engines import THREADS, Child, Onnx
from page import PAGE, replace_between, row
from peers import bandwidth
from subject import SUBJECTS, checkpoint

from v4export import api
from v4export.evaluate.plot import Axis, figure, lines
from v4export.plan.reads import reads
from v4export.precision import precision

BEGIN, END = "<!-- measured: cost of context -->", "<!-- end: cost of context -->"
LAYOUTS = {"V3's layout": "subject", "V4's layout": "v4", "V4.1's layout": "v41"}
CONTEXTS = tuple(1 << power for power in range(10, 17))
ROOM = 64


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep checkpoints and bundles here.")
@click.option("--rounds", default=4, show_default=True, help="Times that the layouts take turns.")
@click.option("--steps", default=6, show_default=True, help="Tokens decoded in a turn, at each number of cached ones.")
@click.option("--chart", type=click.Path(path_type=Path), default=PAGE.with_name("context.svg"), help="To be written.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(folder: Path | None, rounds: int, steps: int, chart: Path, into: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = folder or Path(scratch)
        here.mkdir(parents=True, exist_ok=True)
        seconds: dict[str, dict[int, list[float]]] = {name: {held: [] for held in CONTEXTS} for name in LAYOUTS}
        for _ in range(rounds):
            for name, model in LAYOUTS.items():
                child = Child(name, Onnx, _bundle(model, here), True, CONTEXTS[-1] + ROOM)
                for held in CONTEXTS:
                    child.time(held, 1, 2)
                    seconds[name][held] += child.time(held, 1, steps)
                child.close()
    least = {name: {held: 1e3 * min(each) for held, each in found.items()} for name, found in seconds.items()}
    chart.write_text(drawn(least))
    tables = [
        "![cost of a decoded token](context.svg)",
        table(least, seconds),
        f"{THREADS} threads, float32, {bandwidth() / 1e9:.1f} GB/s.",
    ]
    replace_between(into, BEGIN, END, tables)
    click.echo("\n".join(tables))


def _bundle(model: str, here: Path) -> Path:
    out = here / f"{model}-long"
    if not out.exists():
        how = {"max_seq_len": CONTEXTS[-1] + ROOM, "scan_values": False}
        api.export(checkpoint(here, model), out, precision="fp32", **how)
    return out


def floor_ms(name: str, held: int) -> float:
    """Of one token behind so many."""
    config = SUBJECTS[LAYOUTS[name]][1]()
    return 1e3 * reads(config, precision("fp32", config), held, widened=True, repacked=False).total / bandwidth()


def drawn(least: dict[str, dict[int, float]]) -> str:
    """The chart: what was measured, and what reading weights and rows takes, dashed."""
    measured = {name: [*found.items()] for name, found in least.items()}
    floors = {f"{name}: floor": [(held, floor_ms(name, held)) for held in found] for name, found in least.items()}
    dashed = {f"{name}: floor": name for name in least}
    panel = lines(Axis("cached tokens", log=True), Axis("ms a token", log=True), measured | floors, dashed)
    return figure("Cost of a decoded token", panel, note=f"float32, {THREADS} threads; dashed: reading memory")


def table(least: dict[str, dict[int, float]], seconds: dict[str, dict[int, list[float]]]) -> str:
    """Rows of contexts."""
    found = [row("ms: least (median), of floor", *least), row(*["---"] * (len(least) + 1))]
    for held in CONTEXTS:
        cells = []
        for name in least:
            middle = 1e3 * float(np.median(seconds[name][held]))
            cells.append(f"{least[name][held]:.1f} ({middle:.1f}), {floor_ms(name, held) / middle:.0%}")
        found.append(row(f"{held:,} cached", *cells))
    return "\n".join(found)


if __name__ == "__main__":
    main()
