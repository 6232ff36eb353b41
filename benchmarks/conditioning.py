"""How well conditioned the sums of models are, and what their errors are beside float64: what limits leave to a factor.

Writes the table of docs/verification.md. Takes a minute.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from page import replace_between, row

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from beside_float64 import sums_of  # noqa: E402

from v4export import presets  # noqa: E402
from v4export.checkpoint.synth import synth  # noqa: E402
from v4export.runtime.tokenizer import load_tokenizer  # noqa: E402

PAGE = ROOT / "docs" / "verification.md"
BEGIN, END = "<!-- measured: conditioning -->", "<!-- end: conditioning -->"
TRAINED = ROOT / "examples" / "tiny-v3"
RANDOM = ("tiny-v2-lite", "tiny-v3.2", "tiny-v4")
TOKENS = 200


@click.command(help=__doc__)
def main() -> None:
    lines = [
        row(
            "model",
            "sums",
            "rows",
            "terms",
            "conditioning: median (worst)",
            "error / derived: root mean square (worst)",
        ),
        row(*["---"] * 6),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, prompt in subjects(Path(scratch)):
            found = sums_of(folder, prompt)
            for kind in ("matrix", "attention"):
                some = [one for one in found if one.kind == kind]
                conditioning = torch.cat([one.conditioning for one in some])
                error = torch.cat([one.error for one in some])
                terms = [one.terms for one in some]
                lines.append(
                    row(
                        name, kind, f"{len(error):,}", f"{min(terms)} to {max(terms)}",
                        f"{conditioning.median():.1f} ({conditioning.max():.0f})",
                        f"{error.square().mean().sqrt():.2f} ({error.max():.2f})",
                    )
                )  # fmt: skip
    click.echo("\n".join(lines))
    replace_between(PAGE, BEGIN, END, ["\n".join(lines)])


def subjects(scratch: Path) -> Iterator[tuple[str, Path, list[int]]]:
    """Name, checkpoint and prompt."""
    text = (TRAINED / "heldout.txt").read_text()
    yield "tiny-v3, trained", TRAINED, load_tokenizer(TRAINED).encode(text)[:TOKENS]
    for preset in RANDOM:
        config = presets.load(preset)
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, TOKENS).tolist()
        yield f"{preset}, random", synth(config, scratch / preset), prompt


if __name__ == "__main__":
    main()
