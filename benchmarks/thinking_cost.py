"""What a thought costs, in both forms of its graph, against the number of its steps.

The model is the one of the other tables with two reasoning layers as wide as its own dense layers. Each thought is
timed beside the plain step it follows. Needs a machine that does nothing else.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from engines import THREADS
from page import PAGE, replace_between, row
from subject import MAX_SEQ_LEN, subject

from v4export import api
from v4export.checkpoint.count import parameter_counts
from v4export.config import ModelConfig, Reasoning
from v4export.config.readers import to_hub_config
from v4export.engine.options import EngineOptions
from v4export.graphs.export import THINKING, THINKING_MIX, THINKING_STEP
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor

BEGIN, END = "<!-- measured: thoughts -->", "<!-- end: thoughts -->"
LAYERS, STEPS = 2, (1, 2, 4, 8)
HELD, REPEATS = 512, 24


def model() -> ModelConfig:
    """The subject with reasoning layers."""
    return replace(subject(), family="v4x", reasoning=Reasoning(LAYERS, max(STEPS)))


def floors(config: ModelConfig, steps: int) -> tuple[float, float]:
    """A token with a thought over one without, by passes through layers, and by bytes of weights."""
    parts = parameter_counts(config)
    head = config.vocab_size * config.hidden_size
    more = steps * parts.by_part["reasoning_layers"] + parts.by_part["reasoning_head"] + (1 + max(0, steps - 2)) * head
    return 1 + steps * LAYERS / config.num_layers, 1 + more / parts.active


def measured(bundle: Bundle, steps: int, looped: bool, device: str) -> tuple[float, float]:
    """Milliseconds of a plain step, and of the thought after it; least of several."""
    how = {"max_seq_len": MAX_SEQ_LEN, "threads": THREADS, "prepack": False, "device": device}
    executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
    state, rng = executor.new_state(), np.random.default_rng(0)
    executor.step(rng.integers(3, 300, (1, HELD)), state, logits_at_BQ=np.zeros((1, 0), np.int64))
    plain, thought = [], []
    for token in rng.integers(3, 300, REPEATS):
        start = time.perf_counter()
        executor.step(np.array([[token]]), state, logits_at_BQ=np.zeros((1, 1), np.int64))
        between = time.perf_counter()
        assert executor.trunk is not None
        executor.think(executor.trunk, state, steps=steps, looped=looped)
        plain.append(between - start)
        thought.append(time.perf_counter() - between)
    return min(plain) * 1e3, min(thought) * 1e3


def costs(hub: Path, folder: Path, device: str) -> list[str]:
    """A row for each number of steps."""
    lines = [
        row("steps", "plain step, ms", "thought, ms: unrolled", "looped", "unrolled: a token over a plain one",
            "1 + K r/L passes", "bytes of weights over plain ones"),
        row(*["---"] * 7),
    ]  # fmt: skip
    for steps in STEPS:
        out = folder / f"out-{steps}"
        how = {"precision": "fp32", "max_seq_len": MAX_SEQ_LEN, "scan_values": False, "think_steps": steps}
        bundle = api.export(hub, out, **how).bundle
        (plain, whole), (_, looped) = (measured(bundle, steps, looped, device) for looped in (False, True))
        passes, weights = floors(bundle.config, steps)
        lines.append(
            row(f"{steps}", f"{plain:.1f}", f"{whole:.1f}", f"{looped:.1f}", f"{1 + whole / plain:.2f}",
                f"{passes:.2f}", f"{weights:.2f}")
        )  # fmt: skip
        click.echo(lines[-1], err=True)
    return lines


def engines(folder: Path) -> list[str]:
    """Engines of both forms, of a small model: what unrolling costs the builder."""
    config = replace(api.presets.load("tiny-v3"), reasoning=Reasoning(LAYERS, max(STEPS)))
    (folder / "small.json").write_text(json.dumps(to_hub_config(config)))
    hub = api.synth(str(folder / "small.json"), folder / "small")
    lines = [row("steps", "form", "seconds to build", "MiB", "of them weights", "layers"), row(*["---"] * 6)]
    for steps in STEPS:
        out = folder / f"small-{steps}"
        api.export(hub, out, precision="bf16", think_steps=steps, max_seq_len=2048)
        found = api.engine(out, EngineOptions(targets=["sm89"]))
        for form, names in (("unrolled", [THINKING]), ("step and mix", [THINKING_STEP, THINKING_MIX])):
            reports = [found[name] for name in names]
            lines.append(
                row(f"{steps}", form, f"{sum(r.seconds for r in reports):.1f}",
                    f"{sum(r.bytes for r in reports) / 2**20:.1f}", f"{sum(r.weights_mib for r in reports):.2f}",
                    f"{sum(sum(r.layers.values()) for r in reports)}")
            )  # fmt: skip
        click.echo(lines[-1], err=True)
    return lines


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Where 6 GB are free.  [default: a temporary one]")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
@click.option("--device", default="cpu", show_default=True, help="With cuda, the page stays as it is.")
def main(folder: Path | None, into: Path, device: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        (place / "config.json").write_text(json.dumps(to_hub_config(model())))
        hub = api.synth(str(place / "config.json"), place / "hub")
        lines = costs(hub, place, device)
        if device != "cpu":
            click.echo("\n".join(lines))
            return
        built = engines(place)
    note = (
        f"{THREADS} threads, float32, {HELD} cached tokens, {parameter_counts(model()).total / 1e9:.2f}e9 parameters, "
        f"{LAYERS} reasoning layers beside {subject().num_layers}; least of {REPEATS}. "
        "Engines of `tiny-v3` with reasoning layers, bf16, sm89, built and not run; "
        "`python benchmarks/thinking_cost.py`."
    )
    replace_between(into, BEGIN, END, ["\n".join(lines), "\n".join(built), note])
    click.echo("\n".join([*lines, "", *built]))


if __name__ == "__main__":
    main()
