"""What int8 and int4 cost on a CPU, beside float32 and bfloat16: time of a decoded token, memory, and error.

Needs 6 GB of disk, 12 GB of memory, as all rows are loaded at a time, and a machine that does nothing else.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from cpu import machine
from engines import THREADS, Child, Onnx
from page import PAGE, replace_between, row
from peers import bandwidth
from subject import MAX_SEQ_LEN, subject

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.package.bundle import Bundle
from v4export.plan.reads import reads
from v4export.precision import precision
from v4export.runtime.onnx import OnnxExecutor

BEGIN, END = "<!-- measured: integers on a CPU -->", "<!-- end: integers on a CPU -->"
EXPERTS, HELD, STEPS = 16, 128, 8
PROMPT = np.random.default_rng(0).integers(0, 32000, (1, 64))


@dataclass(frozen=True)
class Case:
    """A row: a recipe, whether its bundle has weights for onnxruntime's kernels, and their accuracy level."""

    recipe: str
    kernels: bool = True
    level: int = 0

    @property
    def folder(self) -> str:
        """Of its bundle."""
        return self.recipe + ("" if self.kernels else "-without")

    def __str__(self) -> str:
        how = ", level 4" if self.level else "" if self.kernels else ", without its kernels"
        return f"`{self.recipe}`{how}"


CASES = (
    Case("fp32"),
    Case("bf16"),
    Case("int8", repacked=False),
    Case("int8"),
    Case("int8", level=4),
    Case("int4", repacked=False),
    Case("int4"),
    Case("int4", level=4),
)


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep checkpoint and bundles here between runs.")
@click.option("--rounds", default=5, show_default=True, help="Times that the rows take turns.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(folder: Path | None, rounds: int, into: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = folder or Path(scratch)
        source = here / f"subject-{EXPERTS}"
        if not source.exists():
            synth(subject(EXPERTS), source)
        for case in CASES:
            if not (here / case.folder).exists():
                how = {"max_seq_len": MAX_SEQ_LEN, "scan_values": False, "cpu_weights": case.kernels}
                api.export(source, here / case.folder, precision=case.recipe, **how)
        tables = [machine(), measured(here, rounds)]
        click.echo("\n\n".join(tables))
    replace_between(into, BEGIN, END, tables)


def measured(here: Path, rounds: int) -> str:
    """A row for each case, all of them loaded and taking turns."""
    engines = [Child(str(case), Onnx, here / case.folder, True, MAX_SEQ_LEN, case.level) for case in CASES]
    for engine in engines:
        engine.time(HELD, 1, 2)
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, found in zip(engines, times, strict=True):
            found += engine.time(HELD, 1, STEPS)
    memory = [engine.held() for engine in engines]
    for engine in engines:
        engine.close()
    gbs = bandwidth() / 1e9
    errors = differences(here)
    lines = [
        row("recipe", "ms a token: least (median)", "float32 / it", "floor, ms", "memory, GB", "loading, s", "error"),
        row(*["---"] * 7),
    ]
    for case, engine, found, (held, anonymous), error in zip(CASES, engines, times, memory, errors, strict=True):
        least, middle = min(found) * 1e3, float(np.median(found)) * 1e3
        reading = active_bytes(case.recipe) / gbs / 1e6
        lines.append(
            row(str(case), f"{least:.1f} ({middle:.1f})", f"{min(times[0]) * 1e3 / least:.2f}", f"{reading:.1f}",
                f"{held:.2f} ({anonymous:.2f})", f"{engine.load_s:.1f}", error)
        )  # fmt: skip
    lines += [
        "",
        f"{THREADS} threads, {HELD} cached tokens, {gbs:.1f} GB/s. *Error*: of the hidden states that leave the",
        f"first layer, which is dense and int8 in both recipes, {PROMPT.size} tokens, relative to the same recipe "
        "without its kernels; routers of later layers,",
        "whose weights are random here, may choose otherwise, and what follows differs by more than arithmetic.",
    ]
    return "\n".join(lines)


def differences(here: Path) -> list[str]:
    """Of the first layer's hidden states from those of the same recipe without onnxruntime's kernels."""
    found: dict[str, np.ndarray] = {}
    for case in CASES:
        bundle = Bundle.open(here / case.folder)
        how = {"max_seq_len": MAX_SEQ_LEN, "threads": THREADS, "accuracy_level": case.level, "taps": ["hidden.0"]}
        executor = OnnxExecutor(bundle.folder, bundle.config, bundle.precision, **how)
        executor.step(PROMPT, executor.new_state(), logits_at_BQ=np.array([[PROMPT.size - 1]]))
        found[str(case)] = executor.tapped["hidden.0"].astype(np.float64)
    return [_error(found, case) for case in CASES]


def _error(found: dict[str, np.ndarray], case: Case) -> str:
    own, base = found[str(case)], found.get(str(Case(case.recipe, repacked=False)))
    if base is None or not case.kernels:
        return ""
    return f"{np.linalg.norm(own - base) / np.linalg.norm(base):.1e}"


def active_bytes(recipe: str) -> float:
    """Bytes of weights that a token's products read, as they are kept for a CPU."""
    config = subject(EXPERTS)
    return reads(config, precision(recipe, config), HELD, widened=True, repacked=True).weights


if __name__ == "__main__":
    main()
