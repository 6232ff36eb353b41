"""Trains a small DeepSeek-V3-like model with and without Engram memory on Python's standard library, and compares.

Both models read the same number of parameters for a token and see the same tokens in the same order:

    python examples/train_engram.py --tokens 800000 --seeds 2 --save tiny-engram

Progress goes to stderr, the result as a Markdown table to stdout.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from training.checkpoint import save
from training.compare import Corpus, corpus, side_by_side
from training.data import standard_library
from training.loop import Run
from training.plot import chart
from training.recipe import Size, Training, build, configs, size

from v4export.config import ModelConfig


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800_000, help="to train on, for each model (default: 800000)")
    parser.add_argument("--models", nargs="+", default=["plain", "engram"], choices=["plain", "engram", "experts"])
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each model (default: 2)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time (default: 2)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the Engram model of the first seed there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the losses there")
    return parser.parse_args()


def figures(
    text: Corpus, options: Training, models: dict[str, ModelConfig], sizes: dict[str, Size], runs: dict[str, list[Run]]
) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": text.counts | {"held_out_bytes": text.held_out_bytes, "compressed_vocab": text.compressed_vocab},
        "training": asdict(options) | {"steps": options.steps},
        "engram": next((asdict(config.engram) for config in models.values() if config.engram), None),
        "models": {name: asdict(one) for name, one in sizes.items()},
        "runs": [
            {"model": name, "seed": seed}
            | asdict(run)
            | {"bits_per_byte": [text.bits_per_byte(loss) for loss in run.losses]}
            for name, several in runs.items()
            for seed, run in enumerate(several)
        ],
    }


def table(text: Corpus, sizes: dict[str, Size], runs: dict[str, list[Run]]) -> str:
    """The end of every training, in Markdown."""
    lines = [
        "| model | active parameters | all parameters | nats a token, each seed | mean | bits a byte | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, several in runs.items():
        ends = [run.losses[-1] for run in several]
        mean = statistics.mean(ends)
        cells = [
            name,
            f"{sizes[name].active:,}",
            f"{sizes[name].total:,}",
            ", ".join(f"{end:.4f}" for end in ends),
            f"{mean:.4f}",
            f"{text.bits_per_byte(mean):.4f}",
            ", ".join(f"{run.seconds:.0f}" for run in several),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: dict[str, list[Run]]) -> str:
    """Held-out losses against tokens, but for the first, which would press the others together."""
    groups = {
        name: [[(n / 1e6, loss) for n, loss in zip(run.tokens, run.losses, strict=True)][-5:] for run in several]
        for name, several in runs.items()
    }
    return chart(
        "Same active parameters, same tokens", "million training tokens", "held-out loss, nats a token", groups
    )


def main() -> None:
    """Trains, prints, writes."""
    asked, start = arguments(), time.perf_counter()
    options = Training(tokens=asked.tokens)
    text = corpus(standard_library(), options.window)
    every = configs(text.compressed_vocab)
    models: dict[str, ModelConfig] = {name: every[name] for name in asked.models}
    sizes = {name: size(build(config)) for name, config in models.items()}
    print(text.summary, file=sys.stderr)
    results = side_by_side(text, models, range(asked.seeds), options, asked.workers)
    runs = {name: [run for run, _ in several] for name, several in results.items()}
    print(table(text, sizes, runs))
    if asked.json:
        found = figures(text, options, models, sizes, runs) | {"seconds": round(time.perf_counter() - start)}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.svg:
        asked.svg.write_text(picture(runs), encoding="utf-8")
    if asked.save and "engram" in models:
        weights = {name: torch.from_numpy(one) for name, one in results["engram"][0][1].items()}
        save(asked.save, models["engram"], weights, text.tokenizer)


if __name__ == "__main__":
    main()
