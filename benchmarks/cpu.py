"""Export, decode and prefill on a CPU beside transformers, in one run, written into docs/benchmarks.md.

Needs 5 GB of disk (10 where another exporter saves its graph), 20 GB of memory, and a machine that does nothing else.
"""

from __future__ import annotations

import platform
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import click
import numpy as np
from engines import THREADS, Child, Onnx, Transformers
from exporting import HOW, attempt
from page import PAGE, replace_between, row
from subject import checkpoint, subject

from v4export.checkpoint.count import parameter_counts
from v4export.package.bundle import Bundle

#: (row, cached tokens, new tokens, onnxruntime's steps in a round, transformers' steps in a round)
CASES = (
    ("decode, 128 cached", 128, 1, 8, 4),
    ("decode, 2048 cached", 2048, 1, 8, 2),
    ("decode, 8192 cached", 8192, 1, 8, 2),
    ("prefill, 512 new", 0, 512, 1, 1),
)

BEGIN, END = "<!-- measured -->", "<!-- end of what was measured -->"


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the checkpoint here between runs.")
@click.option("--rounds", default=4, show_default=True, help="Times that the engines take turns in each row.")
@click.option("--exporter-timeout", default=300.0, show_default=True, help="Seconds for each other exporter; 0: skip.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(folder: Path | None, rounds: int, exporter_timeout: float, into: Path) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        here = Path(scratch)
        model = checkpoint(folder or here)
        tables = [machine(), exports(model, here, exporter_timeout)]
        click.echo("\n\n".join(tables))
        bundle = here / "v4export"
        for table in (speeds(bundle, model, rounds), node_counts(bundle, here)):
            click.echo(f"\n{table}")
            tables.append(table)
    replace_between(into, BEGIN, END, tables)


def exports(model: Path, here: Path, timeout_s: float) -> str:
    """The table of exports; ours always runs, for the rest of the page is measured on what it makes."""
    lines = [row("export", "time, peak memory"), row("---", "---")]
    for how in HOW:
        limit = 600.0 if how == "v4export" else timeout_s
        if limit:
            lines.append(row(how, attempt(how, model, here / how.replace(", ", "-"), limit)))
    return "\n".join(lines)


def machine() -> str:
    """What ran this."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    packages = ", ".join(f"{p} {metadata.version(p)}" for p in ("onnxruntime", "torch", "transformers", "onnx"))
    return f"{cpu or platform.machine()}, {THREADS} threads; Python {platform.python_version()}, {packages}"


def speeds(bundle: Path, model: Path, rounds: int) -> str:
    """The table of steps, engines interleaved, least and median milliseconds of each."""
    engines = [
        Child("onnxruntime", Onnx, bundle, True),
        Child("onnxruntime, mapped", Onnx, bundle, False),
        Child("transformers", Transformers, model),
    ]
    lines = [row("ms: least (median)", *(e.name for e in engines), "transformers / onnxruntime"), row(*["---"] * 5)]
    floor_ms, bandwidth = floor()
    for title, held, new, ours, theirs in CASES:
        times: dict[str, list[float]] = {e.name: [] for e in engines}
        for engine in engines:
            engine.time(held, new, 1)
        for _ in range(rounds):
            for engine in engines:
                times[engine.name] += engine.time(held, new, theirs if engine.name == "transformers" else ours)
        least = {name: min(seconds) * 1e3 for name, seconds in times.items()}
        middle = {name: float(np.median(seconds)) * 1e3 for name, seconds in times.items()}
        cells = [f"{least[e.name]:.1f} ({middle[e.name]:.1f})" for e in engines]
        ratio = [t["transformers"] / t["onnxruntime"] for t in (least, middle)]
        lines.append(row(title, *cells, f"{ratio[0]:.1f} ({ratio[1]:.1f})"))
        if held == CASES[0][1]:
            over_floor = f"{least['onnxruntime'] / floor_ms:.2f}, mapped {least['onnxruntime, mapped'] / floor_ms:.2f}"
    lines.append(row("loading, s", *(f"{e.load_s:.1f}" for e in engines), ""))
    lines.append(row("peak memory, GB", *(f"{e.close():.2f}" for e in engines), ""))
    megabytes = 4 * parameter_counts(subject()).active / 1e6
    lines += [
        "",
        f"Experts of transformers: `{engines[-1].note}`.",
        f"Floor: {megabytes:.0f} MB at {bandwidth:.1f} GB/s = {floor_ms:.1f} ms a token.",
        f"At 128 cached tokens onnxruntime takes {over_floor} times that.",
    ]
    return "\n".join(lines)


def floor() -> tuple[float, float]:
    """Milliseconds that reading a token's weights takes, and the read bandwidth in GB/s, best of several."""
    import torch

    torch.set_num_threads(THREADS)
    block, best = torch.ones(1 << 28), float("inf")
    for _ in range(12):
        start = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - start)
    bandwidth = block.numel() * 4 / best / 1e9
    return 4 * parameter_counts(subject()).active / bandwidth / 1e6, bandwidth


def node_counts(bundle: Path, here: Path) -> str:
    """Nodes of the portable graph at 8 and at 256 experts; weights are holes, which a graph does not notice."""
    from v4export import api
    from v4export.checkpoint.synth import synth

    counts = {subject().num_experts: Bundle.open(bundle).manifest["graphs"]["nodes"]}
    for experts in (8, 256):
        # The router's groups are set aside, for eight experts cannot fill the subject's.
        config = replace(subject(experts), num_groups=1, topk_groups=1)
        source = synth(config, here / f"sparse-{experts}", sparse=True)
        counts[experts] = api.export(source, here / f"graph-{experts}", precision="fp32").graphs.nodes
    return "Nodes of model.onnx: " + ", ".join(f"{n} with {e} experts" for e, n in sorted(counts.items())) + "."


if __name__ == "__main__":
    main()
