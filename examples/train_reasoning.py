"""Trains a small model with reasoning layers on Python's standard library, and measures what thinking brings.

First the model alone, then thoughts about what it then knows:

    python examples/train_reasoning.py --save tiny-v4x

Progress goes to stderr, losses on held-out text as a Markdown table to stdout. They are of the weights as a checkpoint
has them, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from training.checkpoint import in_bfloat16, save
from training.compare import Corpus, corpus, rows_of
from training.data import Text, standard_library
from training.look_ahead import LookAhead
from training.loop import Run, train
from training.pausing import Predictions, best_threshold, loss_with_thoughts, predictions
from training.recipe import Training, build, full
from training.thoughts import ThinkingLM

from v4export.config import ModelConfig

VOCAB = 1024
#: Nats of entropy above which a prediction is thought about, for the table.
THRESHOLDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
#: The part of what thinking everywhere gains that has to remain at the threshold in config.json.
KEEP = 0.8
#: Windows of the text trained on by which that is judged, and of held-out text that show how a training goes on; and
#: characters of held-out text that are saved.
JUDGED, WATCHED, SAVED = 64, 32, 32_000


@dataclass(frozen=True)
class Trained:
    """What two trainings, one after the other, gave.

    Attributes:
        model: with weights as they are stored.
        config: with a threshold.
        runs: of the model alone, and of thoughts, with the losses of a part of the text held out.
        held_out: predictions.
        judged: predictions of text trained on.
    """

    model: ThinkingLM
    config: ModelConfig
    runs: tuple[Run, Run]
    held_out: Predictions
    judged: Predictions


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="to train the model alone on (default: 2000000)")
    parser.add_argument("--more-tokens", type=int, default=2_000_000, help="to train thoughts on (default: 2000000)")
    parser.add_argument("--positions", type=int, default=192, help="of a window that are thought about (default: 192)")
    parser.add_argument("--ahead", type=int, default=1, help="tokens to predict behind a thought (default: 1)")
    parser.add_argument(
        "--policy", type=float, default=0.0, metavar="WEIGHT", help="draw thoughts, and train them by REINFORCE as well"
    )
    parser.add_argument("--together", action="store_true", help="train the model on while thoughts are trained")
    parser.add_argument("--window", type=int, default=512, help="tokens of a sequence (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step (default: 4)")
    parser.add_argument("--files", type=int, metavar="N", help="take no more than N files, to try this out")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and positions (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="more bring little at these sizes (default: 1)")
    parser.add_argument(
        "--control", action="store_true", help="also train the model alone on the tokens of both trainings"
    )
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the model there, as a checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser.parse_args()


def phases(asked: argparse.Namespace) -> tuple[Training, Training]:
    """The model alone; then thoughts, and where the model is not to change, its routers do not either.

    Together, the two share embedding, norm and head, and the model itself loses more than its thoughts bring.
    """
    alone = Training(asked.tokens, window=asked.window, batch=asked.batch, measurements=4)
    return alone, replace(alone, tokens=asked.more_tokens, balance=alone.balance * asked.together)


def trained(text: Corpus, asked: argparse.Namespace) -> Trained:
    """Both phases, weights rounded, and what they predict."""
    config = full(text.tokenizer.get_vocab_size(), text.compressed_vocab)
    torch.manual_seed(asked.seed)
    model, rows = build(config), rows_of(config, text.token_map)
    assert isinstance(model, ThinkingLM)
    loss = LookAhead(asked.positions, asked.ahead, policy=asked.policy)
    first, second = phases(asked)
    model.model.reasoning.requires_grad_(False)
    runs = [train(model, rows, text.train, text.held_out, first, asked.seed, "alone")]
    model.requires_grad_(asked.together)
    model.model.reasoning.requires_grad_(True)
    part = evenly(text.held_out, WATCHED), second, asked.seed + 1, "thinking"
    runs += [train(model, rows, text.train, *part, loss=loss, measure=loss_with_thoughts)]
    model.load_state_dict(in_bfloat16(config, model.state_dict()))
    held_out, judged = (predictions(model, rows, one) for one in (text.held_out, evenly(text.train, JUDGED)))
    threshold = best_threshold(judged, config.vocab_size, KEEP)
    assert config.reasoning
    config = replace(config, reasoning=replace(config.reasoning, threshold=threshold))
    return Trained(model, config, (runs[0], runs[1]), held_out, judged)


def control(text: Corpus, asked: argparse.Namespace) -> Run:
    """The same model without thoughts, on the tokens of both phases."""
    config = full(text.tokenizer.get_vocab_size(), text.compressed_vocab)
    torch.manual_seed(asked.seed)
    model, rows = build(config), rows_of(config, text.token_map)
    model.model.reasoning.requires_grad_(False)
    options = replace(phases(asked)[0], tokens=asked.tokens + asked.more_tokens)
    return train(model, rows, text.train, text.held_out, options, asked.seed, "control")


def evenly(windows: Any, count: int) -> Any:
    """So many of them or fewer, equally far apart."""
    return windows[:: max(1, -(-len(windows) // count))]


def measured(found: Predictions, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Never thinking, always, and where the entropy is above some threshold: nats a token, and how many pause."""
    ways: list[tuple[str, float | None, tuple[float, float]]] = [
        ("never", None, (found.plain.mean().item(), 0.0)),
        ("always", None, (found.mixed.mean().item(), 1.0)),
        *(("auto", one, found.auto(one)) for one in thresholds),
    ]
    return [{"think": way, "threshold": at, "nats": loss, "pausing": share} for way, at, (loss, share) in ways]


def table(rows: list[dict[str, Any]], chosen: float) -> str:
    """The same in Markdown."""
    lines = ["| thinks | positions that pause | nats a token | gain |", "| --- | --- | --- | --- |"]
    for row in rows:
        where = "" if row["threshold"] is None else f", entropy above {row['threshold']:g}"
        where += " (chosen)" if row["threshold"] == chosen else ""
        gain = rows[0]["nats"] - row["nats"]
        lines.append(f"| {row['think']}{where} | {row['pausing']:.1%} | {row['nats']:.4f} | {gain:.4f} |")
    return "\n".join(lines)


def figures(text: Corpus, asked: argparse.Namespace, result: Trained, seconds: float) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    thinker, chosen = result.model.model.reasoning, result.config.reasoning
    assert chosen
    thresholds = sorted({*THRESHOLDS, chosen.threshold})
    first, second = phases(asked)
    return {
        "command": shlex.join(["python", "examples/train_reasoning.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": text.counts | {"judged_tokens": len(result.judged.plain)},
        "parameters": sum(one.numel() for one in result.model.parameters()),
        "reasoning_parameters": sum(one.numel() for one in thinker.parameters()),
        "reasoning": asdict(chosen),
        "alone": asdict(first) | asdict(result.runs[0]),
        "thinking": asdict(second) | asdict(result.runs[1]),
        "thoughts": asdict(LookAhead(asked.positions, asked.ahead, policy=asked.policy)),
        "held_out": measured(result.held_out, thresholds),
        "held_out_weight": [fn(result.held_out.weight).item() for fn in (torch.mean, torch.std)],
        "trained_on": measured(result.judged, thresholds),
        "threshold_rule": f"highest at which auto keeps {KEEP:.0%} of what always gains, on text trained on",
        "seconds": round(seconds),
    }


def main() -> None:
    """Trains, prints, writes."""
    asked, start = arguments(), time.perf_counter()
    torch.set_num_threads(asked.threads)
    files = standard_library()
    if asked.files:
        files = Text(files.train[: asked.files], files.held_out[: max(1, asked.files // 20)])
    text = corpus(files, asked.window, VOCAB)
    print(text.summary, file=sys.stderr)
    result = trained(text, asked)
    found = figures(text, asked, result, time.perf_counter() - start)
    assert result.config.reasoning
    print(table(found["held_out"], result.config.reasoning.threshold))
    if asked.control:
        found["control"] = asdict(control(text, asked))
        end = found["control"]["losses"][-1]
        print(f"\nThe same model trained alone on the tokens of both trainings: {end:.4f} nats a token")
    content = json.dumps(found, indent=1) + "\n"
    if asked.json:
        asked.json.write_text(content, encoding="utf-8")
    if asked.save:
        weights = in_bfloat16(result.config, result.model.state_dict())
        save(asked.save, result.config, weights, text.tokenizer)
        (asked.save / "heldout.txt").write_text("".join(files.held_out)[:SAVED], encoding="utf-8")
        (asked.save / "training.json").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
