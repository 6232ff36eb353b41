"""Exports of models of hundreds of gigabytes, from checkpoints whose bytes are holes; how their time grows with layers
and experts; and one of eight gigabytes of real bytes, converted to FP8.

Every export is a process of its own; times and memory are that process's, imports included. Needs 20 GB of disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import exporting
import psutil
import torch
from page import PAGE, replace_between, row
from subject import subject

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.evaluate.plot import Axis, figure, lines

BEGIN, END = "<!-- measured: scale -->", "<!-- end: scale -->"
PLOT = PAGE.with_name("scale.svg")
MODELS = ("kimi-k2", "v4-1t", "deepseek-v4-pro", "deepseek-v4.1-flash")
LAYERS, EXPERTS = (8, 16, 32, 61), (8, 32, 128, 384)
#: Experts of the model of real bytes: 4e9 parameters.
REAL = 280
#: Experts of models that PyTorch's exporter is tried on, until it manages one.
EXPORTABLE = (245, 128, 64)
STAGES = ("trace", "weights", "graph")


def child(what: str, *arguments: Any) -> dict[str, float]:
    """What ``what`` below returns in a process of its own, with the seconds of that and the peak memory, in GB.

    The peak is of the process, or of it and those that it started, added up, whatever they share.
    """
    command = [sys.executable, __file__, "--child", what, *map(str, arguments)]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        running = psutil.Popen(command, stdout=said, stderr=complained)
        while running.poll() is None:
            with contextlib.suppress(psutil.Error):
                family = [running, *running.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in family))
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        for stream in (said, complained):
            stream.seek(0)
        if running.returncode:
            raise click.ClickException(f"{what} {arguments}: {complained.read()[-800:]}")
        found = json.loads(said.read().splitlines()[-1])
    return {"seconds": seconds, **found, "peak_gb": max(peak / 1e9, found["peak_gb"])}


def export(model: str, out: str, precision: str, scan: str) -> dict[str, float]:
    from v4export import api

    built = api.export(model, out, precision=precision, scan_values=scan == "scan", force=True)
    stages = json.loads((Path(out) / "v4export.json").read_text())["stages"]
    found = {one["name"]: one["seconds"] for one in stages}
    pointed, written = built.graphs.pointed_bytes, built.graphs.written_bytes
    return {**found, "nodes": built.graphs.nodes, "pointed": pointed, "written": written}


def checked(out: str) -> dict[str, float]:
    """The portable graph by ONNX's checker, and onnxruntime's copy as a session, whose weights nobody reads.

    The checker refuses hard links, so weights are inputs to it.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load(f"{out}/model.onnx", load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    model.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(f"{out}/model.cpu.onnx", options, providers=["CPUExecutionProvider"])
    return {"inputs": len(session.get_inputs())}


def transformers(model: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return {}


def torch_onnx(model: str, out: str) -> dict[str, float]:
    exporting.torch_onnx(Path(model), Path(out), "batched_mm", "bfloat16")
    return {}


CHILDREN = {"export": export, "checked": checked, "transformers": transformers, "torch_onnx": torch_onnx}


def peak_gb() -> float:
    """Of this process, pages of mapped files included."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024 / 1e9


def largest(here: Path) -> str:
    """A row for each model of its real size."""
    header = ("checkpoint", "used where they lie", "written", "nodes", "time", "peak memory", "checker and onnxruntime")
    table = [row(*header), row(*("---" for _ in header))]
    for name in MODELS:
        hub = here / name
        if not hub.exists():
            synth(presets.load(name), hub, sparse=True)
        found = child("export", hub, here / "out", "native", "no scan")
        look = child("checked", here / "out")
        table.append(
            row(
                f"`{name}`",
                f"{found['pointed'] / 2**30:,.0f} GiB",
                f"{found['written'] / 2**20:.1f} MiB",
                f"{found['nodes']:,}",
                f"{found['seconds']:.0f} s",
                f"{found['peak_gb']:.2f} GB",
                f"pass, {look['seconds']:.0f} s, {look['peak_gb']:.1f} GB",
            )
        )
        click.echo(table[-1])
    return "\n".join(table)


def growth(here: Path) -> tuple[str, str]:
    """A row for each number of layers and of experts, and the plot of both."""
    base = replace(presets.load("kimi-k2"), num_mtp_layers=0)
    header = ("layers", "experts", *STAGES, "whole process")
    table, curves = [row(*header), row(*("---" for _ in header))], []
    for what, sizes in (("layers", LAYERS), ("experts", EXPERTS)):
        times: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
        for size in sizes:
            config = _sized(base, **{what: size})
            hub = here / f"{what}-{size}"
            if not hub.exists():
                synth(config, hub, sparse=True)
            found = child("export", hub, here / "out", "native", "no scan")
            for stage in STAGES:
                times[stage].append((size, found[stage]))
            cells = [f"{found[stage]:.1f} s" for stage in STAGES]
            table.append(row(str(config.num_layers), str(config.num_experts), *cells, f"{found['seconds']:.0f} s"))
            click.echo(table[-1])
        curves.append(lines(Axis(what), Axis("seconds"), times))
    return "\n".join(table), figure("Export of Kimi-K2's shape", *curves, note="384 experts; 61 layers")


def _sized(base: ModelConfig, layers: int = 61, experts: int = 384) -> ModelConfig:
    chosen = base.first_layers(layers)
    return replace(chosen, num_experts=experts, left_out_layers=0, experts_per_token=min(8, experts))


def real(here: Path) -> str:
    """Eight gigabytes of bfloat16 to FP8, beside loading them, beside the disk, and beside PyTorch's own exporter."""
    hub = bytes_of(here, REAL)
    size = gigabytes(hub)
    table = [row("what", "time", "rate", "peak memory"), row("---", "---", "---", "---")]

    def add(what: str, found: dict[str, float], rate: str = "", of_which: str = "") -> None:
        table.append(row(what, f"{found['seconds']:.0f} s{of_which}", rate, f"{found['peak_gb']:.2f} GB"))
        click.echo(table[-1])

    shards = sorted(hub.glob("*.safetensors"))
    out_of_memory(shards)
    found = child("export", hub, here / "out", "fp8", "no scan")
    written = found["written"] / 1e9
    what = f"v4export: {size:.1f} GB of bfloat16 written as {written:.1f} GB of FP8, no file in memory before"
    rate = f"{size / found['weights']:.2f} GB/s"
    add(what, found, rate, f", of which {found['weights']:.0f} s convert")
    out_of_memory(shards)
    seconds = as_disk(shards, int(found["written"]), here / "disk")
    rate = f"{size / seconds:.2f} GB/s"
    table.append(
        row(
            "the same bytes read, hashed and as many written, nothing converted, likewise", f"{seconds:.0f} s", rate, ""
        )
    )
    add("v4export, bf16: nothing converted", child("export", hub, here / "out", "bf16", "no scan"))
    add("transformers, loaded", child("transformers", hub))
    for experts in EXPORTABLE:
        hub = bytes_of(here, experts)
        what = f"of {gigabytes(hub):.1f} GB of bfloat16"
        try:
            found = child("torch_onnx", hub, here / "other")
        except click.ClickException:
            table.append(row(f"torch.onnx.export {what}", "fails", "", ""))
            click.echo(table[-1])
            continue
        add(f"torch.onnx.export {what}", found)
        add(f"v4export, bf16, {what}", child("export", hub, here / "out", "bf16", "no scan"))
        break
    return "\n".join(table)


def bytes_of(here: Path, experts: int) -> Path:
    """A checkpoint of bfloat16 with real bytes."""
    hub = here / f"real-{experts}"
    config = replace(subject(experts), num_groups=7 if experts % 7 == 0 else 8, topk_groups=4, dtype="bfloat16")
    return hub if hub.exists() else synth(config, hub)


def gigabytes(hub: Path) -> float:
    return sum(file.stat().st_size for file in hub.glob("*.safetensors")) / 1e9


def out_of_memory(files: list[Path]) -> None:
    """Let go of what the system holds of files, so that they are read from the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def as_disk(files: list[Path], written: int, scratch: Path) -> float:
    """Seconds to read files, hash them as a build does, and write as many bytes as it writes."""
    start = time.perf_counter()
    with scratch.open("wb") as out:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while window := stream.read(8 << 20):
                    digest.update(window)
                    out.write(window[: max(0, min(len(window), written - out.tell()))])
        out.flush()
        os.fsync(out.fileno())
    scratch.unlink()
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep checkpoints here between runs.")
@click.option("--child", is_flag=True, hidden=True)
@click.argument("arguments", nargs=-1)
def main(folder: Path | None, child: bool, arguments: tuple[str, ...]) -> None:
    if child:
        what, *rest = arguments
        found = CHILDREN[what](*rest)
        print(json.dumps({**found, "peak_gb": peak_gb()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        here = folder or Path(scratch)
        here.mkdir(parents=True, exist_ok=True)
        tables = [largest(here)]
        table, plot = growth(here)
        PLOT.write_text(plot)
        machine = f"2 cores; torch {torch.__version__}"
        replace_between(
            PAGE, BEGIN, END, [machine, *tables, table, "![Time against layers and experts](scale.svg)", real(here)]
        )


if __name__ == "__main__":
    main()
