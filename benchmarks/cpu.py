"""Export, prompts and decoding on a CPU beside transformers and llama.cpp, in one run, written into docs/benchmarks.md.

Needs the extra ``bench``, 40 GB of disk (120 where all is kept), 24 GB of memory, and a machine that does nothing else.
Parts of the page can be measured by themselves; all take hours. Engines take turns, one loaded at a time, so that each
has the memory and both threads for itself.
"""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import click
from engines import THREADS
from exporting import HOW, attempt
from page import PAGE, replace_between, row
from peers import CASES, Measured, bandwidth, engines_of, measured
from subject import SUBJECTS, checkpoint, subject

from v4export.package.bundle import Bundle

EXPORTS = "exports"
PARTS = (EXPORTS, *SUBJECTS)


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep checkpoints, GGUF files and bundles here.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="Measure it; else all.")
@click.option("--rounds", default=3, show_default=True, help="Times that the engines take turns.")
@click.option("--steps", default=8, show_default=True, help="Tokens decoded in a turn, at each number of cached ones.")
@click.option("--compile-timeout", default=900.0, show_default=True, help="Seconds of torch.compile; 0: skip.")
@click.option("--exporter-timeout", default=300.0, show_default=True, help="Seconds for each other exporter; 0: skip.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured parts are replaced.")
def main(
    folder: Path | None,
    parts: tuple[str, ...],
    rounds: int,
    steps: int,
    compile_timeout: float,
    exporter_timeout: float,
    into: Path,
) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            here = folder or Path(scratch)
            if part == EXPORTS:
                tables = [exports(checkpoint(here), Path(scratch), exporter_timeout), node_counts(Path(scratch))]
            else:
                engines = engines_of(part, here, compiled=compile_timeout > 0)
                tables = [f"**{SUBJECTS[part][0]}**", table(measured(engines, rounds, steps, compile_timeout))]
        tables.append(machine())
        click.echo("\n\n".join(tables) + "\n")
        replace_between(into, *marks(part), tables)


def marks(part: str) -> tuple[str, str]:
    """What is before and behind a part of the page."""
    return f"<!-- measured on a CPU: {part} -->", f"<!-- end on a CPU: {part} -->"


def exports(model: Path, here: Path, timeout_s: float) -> str:
    """The table of exports; ours always runs."""
    lines = [row("export", "time, peak memory"), row("---", "---")]
    for how in HOW:
        limit = 600.0 if how == "v4export" else timeout_s
        if limit:
            lines.append(row(how, attempt(how, model, here / how.replace(", ", "-"), limit)))
    return "\n".join(lines)


def machine() -> str:
    """What ran this, and how fast it reads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    names = ("onnxruntime", "torch", "transformers", "onnx", *(("llama-cpp-python",) if find_spec("llama_cpp") else ()))
    packages = ", ".join(f"{p} {metadata.version(p)}" for p in names)
    reads = f"{THREADS} threads reading {bandwidth() / 1e9:.1f} GB/s"
    return f"{cpu or platform.machine()}, {reads}; Python {platform.python_version()}, {packages}."


def table(found: list[Measured]) -> str:
    """Rows of engines: tokens a second, best and median, session start, memory, and the floor of a decoded token."""
    gbs = bandwidth() / 1e9
    head = ("tokens/s: best (median)", *(f"tg, {held} cached" if held else f"pp{new}" for held, new in CASES))
    head = (*head, "start, s", "peak, GB", "floor, ms", "of floor")
    lines = [row(*head), row(*["---"] * len(head))]
    lines += [row(one.name, *one.cells(gbs)) for one in found]
    return "\n".join(lines)


def node_counts(here: Path) -> str:
    """Nodes of the portable graph at 8 and at 256 experts; weights are holes, which a graph does not notice."""
    from v4export import api
    from v4export.checkpoint.synth import synth

    counts = {subject().num_experts: Bundle.open(here / "v4export").manifest["graphs"]["nodes"]}
    for experts in (8, 256):
        # The router's groups are set aside, for eight experts cannot fill the subject's.
        config = replace(subject(experts), num_groups=1, topk_groups=1)
        source = synth(config, here / f"sparse-{experts}", sparse=True)
        counts[experts] = api.export(source, here / f"graph-{experts}", precision="fp32").graphs.nodes
    return "Nodes of model.onnx: " + ", ".join(f"{n} with {e} experts" for e, n in sorted(counts.items())) + "."


if __name__ == "__main__":
    main()
