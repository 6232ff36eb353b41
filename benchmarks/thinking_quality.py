"""What thinking is worth on text that the small trained model has not seen, and what it costs: never, auto, always.

The text is fed a token at a time through onnxruntime, as it would be generated; a token's loss and time are those of
its prediction, with a thought where the confidence test asks for one. Needs a machine that does nothing else.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from engines import THREADS
from page import PAGE, replace_between, row

from v4export import api
from v4export.package.bundle import Bundle
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing, paused
from v4export.runtime.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from training.plot import chart  # noqa: E402

BEGIN, END = "<!-- measured: thinking -->", "<!-- end: thinking -->"
EXAMPLE, PICTURE = ROOT / "examples" / "tiny-v4x", ROOT / "docs" / "thinking.svg"
#: The text is cut into windows of as many tokens as the model was trained on.
TOKENS, WINDOW, THRESHOLDS = 4096, 512, (5.0, 4.5, 4.0, 3.5, 3.0, 2.0, 1.0)


@dataclass(frozen=True)
class Measured:
    """Nats and milliseconds a token, and the share of tokens that paused."""

    name: str
    loss: float
    ms: float
    share: float


def measure(executor: OnnxExecutor, ids: list[int], name: str, pausing: Pausing | None) -> Measured:
    """Feed the text, a prediction for each token but the first; time from the medians with and without a thought."""
    state, losses = executor.new_state(), []
    took: dict[bool, list[float]] = {False: [], True: []}
    one = np.zeros((1, 1), np.int64)
    for i, following in enumerate(ids[1:]):
        state = executor.new_state() if i % WINDOW == 0 else state
        start = time.perf_counter()
        logits_BV = executor.step(np.array([[ids[i]]]), state, logits_at_BQ=one)[:, 0]
        assert executor.trunk is not None
        logits_BV, pauses = paused(executor, state, pausing, logits_BV, executor.trunk[:, 0], np.array([True]), i)
        took[pauses[0] is not None].append(time.perf_counter() - start)
        shifted = logits_BV[0].astype(np.float64) - logits_BV[0].max()
        losses.append(np.log(np.exp(shifted).sum()) - shifted[following])
    share = len(took[True]) / len(losses)
    ms = sum(float(np.median(some)) * 1e3 * len(some) / len(losses) for some in took.values() if some)
    return Measured(name, float(np.mean(losses)), ms, share)


def picture(found: list[Measured]) -> str:
    """Loss against time: auto at every threshold, from never to always."""
    groups = {  # its name stands at the end of a line, where nothing else does
        "auto": [[(m.ms, m.loss) for m in reversed(found[1:-1])]],
        "never": [[(found[0].ms, found[0].loss)]],
        "always": [[(found[-1].ms, found[-1].loss)]],
    }
    return chart("Where to pause", "milliseconds a token", "held-out loss, nats a token", groups)


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), default=EXAMPLE, help="A trained checkpoint.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
@click.option("--svg", type=click.Path(path_type=Path), default=PICTURE, help="Picture to draw.")
def main(model: Path, into: Path, svg: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        api.export(model, out, precision="fp32")
        bundle = Bundle.open(out)
        stored = bundle.manifest["thinking"]
        how = {"max_seq_len": bundle.max_seq_len, "threads": THREADS}
        executor = OnnxExecutor(out, bundle.config, bundle.precision, **how)
        ids = load_tokenizer(out).encode((model / "heldout.txt").read_text())[: TOKENS + 1]
        runs: list[tuple[str, Pausing | None]] = [("never", None)]
        thresholds = sorted({*THRESHOLDS, round(stored["threshold"], 3)}, reverse=True)
        for threshold in thresholds:
            chosen = " (the model's)" if threshold == round(stored["threshold"], 3) else ""
            runs.append((f"auto, {stored['confidence']} above {threshold:g}{chosen}",
                         Pausing.read("auto", stored, threshold)))  # fmt: skip
        runs.append(("always", Pausing(always=True)))
        measure(executor, ids[:64], "warm", runs[-1][1])
        found = [measure(executor, ids, *run) for run in runs]
    lines = [
        row("pauses", "share of tokens", "held-out loss, nats", "ms a token", "time over never"),
        row(*["---"] * 5),
    ]
    lines += [row(m.name, f"{m.share:.1%}", f"{m.loss:.4f}", f"{m.ms:.2f}", f"{m.ms / found[0].ms:.2f}") for m in found]
    note = f"{len(ids) - 1} tokens in windows of {WINDOW}, {THREADS} threads, float32, "
    note += f"thoughts of {stored['steps']} steps; "
    note += "`python benchmarks/thinking_quality.py`."
    svg.write_text(picture(found))
    replace_between(into, BEGIN, END, ["\n".join(lines), note])
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
