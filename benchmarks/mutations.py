"""Plants single faults in exported graphs and their weights, and counts how many ``verify`` and ``bisect`` find.

Most of the time goes into verifying. Writes the tables of docs/bisect.md. With ``--keep FILE``, what is found is kept
there as it is found, and a run that was stopped goes on with it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from page import replace_between, row

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "bisect")]

from mutations import faults  # noqa: E402
from planted import Outcome, Sound  # noqa: E402

from v4export import api  # noqa: E402
from v4export.graphs.export import PORTABLE, REMEMBERING, THINKING, THINKING_MIX, THINKING_STEP  # noqa: E402
from v4export.package.bundle import Bundle  # noqa: E402

PAGE = ROOT / "docs" / "bisect.md"
BEGIN, END = "<!-- measured: mutations -->", "<!-- end: mutations -->"


@dataclass(frozen=True)
class Subject:
    """A bundle that faults are planted in: its preset and precision, the graph, and how many kinds of fault."""

    preset: str
    precision: str
    most: int
    graph: str = PORTABLE

    @property
    def name(self) -> str:
        return f"{self.preset} {self.precision}" + (f" {self.graph}" if self.graph != PORTABLE else "")


SUBJECTS = (
    Subject("tiny-v2-lite", "fp32", 60),
    Subject("tiny-v3", "fp32", 60),
    Subject("tiny-v3", "fp8", 40),
    Subject("tiny-v3", "bf16", 24),
    Subject("tiny-v3.2", "fp32", 60),
    Subject("tiny-v4", "fp32", 36),
    Subject("tiny-v4.1", "fp32", 20),
    Subject("tiny-v4.1", "fp32", 4, REMEMBERING),
    Subject("tiny-v4x", "fp32", 6, THINKING),
    Subject("tiny-v4x", "fp32", 6, THINKING_STEP),
    Subject("tiny-v4x", "fp32", 4, THINKING_MIX),
    Subject("tiny-v4x", "fp32", 24),
)


def bundle_of(subject: Subject, folder: Path) -> Bundle:
    """A bundle of random weights, made once."""
    checkpoint, out = folder / subject.preset, folder / f"{subject.preset}-{subject.precision}"
    if not checkpoint.exists():
        api.synth(subject.preset, checkpoint)
    if not out.exists():
        length = min(1024, api.inspect(subject.preset).config.max_position_embeddings)
        api.export(checkpoint, out, precision=subject.precision, max_seq_len=length)
    return Bundle.open(out)


def outcomes(
    subject: Subject, number: int, folder: Path, known: dict[str, Outcome], keep: Path | None
) -> list[Outcome]:
    """Of all faults of a subject, in order."""
    sound, found = Sound(bundle_of(subject, folder), subject.graph), []
    for fault in faults(sound.site, subject.most, number):
        name = f"{subject.name}: {fault.kind}: {fault.place}"
        if name not in known:
            start = time.monotonic()
            known[name] = outcome = sound.try_fault(fault, folder / "copy")
            click.echo(f"{outcome.verdict:12} {time.monotonic() - start:5.1f} s  {name}", err=True)
            if keep:
                with open(keep, "a") as file:
                    file.write(json.dumps({"name": name, **asdict(outcome)}) + "\n")
        found.append(known[name])
    return found


def tables(found: dict[str, list[Outcome]]) -> list[str]:
    """By subject, and what is not as it should be, one by one."""
    head = ["subject", "faults", "unchanged", "caught by `verify`", "of which cannot run", "node named by `bisect`"]
    lines, total = [row(*head), row("---", *["---:"] * 5)], Counter[str]()
    for name, some in found.items():
        counts = Counter(one.verdict for one in some if one.planted)
        counts["stopped"] = sum(one.caught.startswith("cannot run") for one in some)
        lines.append(_counted(name, counts))
        total += counts
    lines.append(_counted("**all**", total))
    return ["\n".join(lines), *_lists(found)]


def _counted(name: str, counts: Counter[str]) -> str:
    changed = counts["missed"] + counts["named"] + counts["not named"]
    caught = changed - counts["missed"]
    share = f"{caught} of {changed}", str(counts["stopped"]), f"{counts['named']} of {caught}"
    return row(name, str(changed), str(counts["unchanged"]), *share)


def _lists(found: dict[str, list[Outcome]]) -> list[str]:
    headings = {
        "missed": "Missed by `verify`",
        "not named": "Caught, and another node named",
        "unchanged": "Not counted, as no bit of any result differs",
    }
    lists = []
    for verdict, heading in headings.items():
        some = [(name, one) for name, each in found.items() for one in each if one.verdict == verdict]
        lines = [
            f"* {name}: {one.kind}, {one.place}" + f" (named: {one.named})" * bool(one.named) for name, one in some
        ]
        lists.append("\n".join([f"{heading}: {len(some) or 'none'}.", *([""] if lines else []), *lines]))
    return lists


def _kept(file: Path | None) -> dict[str, Outcome]:
    if file is None or not file.exists():
        return {}
    stored: Sequence[dict] = [json.loads(line) for line in file.read_text().splitlines()]
    return {one.pop("name"): Outcome(**one) for one in stored}


@click.command()
@click.option("--keep", type=click.Path(path_type=Path), help="File of what is found, to go on from.")
@click.option("--folder", type=click.Path(path_type=Path), help="Of bundles, to use again.  [default: a temporary one]")
def main(keep: Path | None, folder: Path | None) -> None:
    """Plant all faults and write the tables."""
    torch.set_num_threads(1)
    known, start = _kept(keep), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            subject.name: outcomes(subject, number, folder or Path(scratch), known, keep)
            for number, subject in enumerate(SUBJECTS)
        }
    replace_between(PAGE, BEGIN, END, tables(found))
    click.echo(f"{time.process_time() - start:.0f} s of processor time", err=True)


if __name__ == "__main__":
    main()
