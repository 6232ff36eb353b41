"""What each recipe costs the small trained model in quality, on text that it has not seen: a table and a chart.

Every recipe by the definition, one of them with cached rows in FP8, and one as its exported graph by onnxruntime.
Inputs that are rounded by scales are calibrated on other text: the example's own Python files.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
from page import PAGE, replace_between, row

from v4export import api
from v4export.evaluate.report import quality_chart
from v4export.evaluate.results import rows
from v4export.progress import Stages

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- measured: recipes -->", "<!-- end: recipes -->"
EXAMPLE, PICTURE = ROOT / "examples" / "tiny-v3", ROOT / "docs" / "recipes.svg"
#: The model was trained on windows of as many tokens.
WINDOW = 128
WITH_STATE, AS_GRAPH = "bf16", "fp8"


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(1), help="Most tokens of the text.  [default: all]")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
@click.option("--svg", type=click.Path(path_type=Path), default=PICTURE, help="Picture to draw.")
def main(tokens: int | None, into: Path, svg: Path) -> None:
    stages = Stages()
    how = {"text": EXAMPLE / "heldout.txt", "context": WINDOW, "tokens": tokens, "stages": stages}
    with tempfile.TemporaryDirectory() as scratch:
        other, bundle = Path(scratch) / "calibration.txt", Path(scratch) / "bundle"
        other.write_text("\n".join(file.read_text() for file in sorted((ROOT / "examples" / "training").glob("*.py"))))
        found = api.evaluate(EXAMPLE, calibrate=other, **how)
        narrow = api.evaluate(EXAMPLE, precision=[WITH_STATE], state="fp8", **how).recipes[-1]
        api.export(EXAMPLE, bundle, precision=AS_GRAPH, stages=stages)
        graph = api.evaluate(bundle, **how).recipes[-1]
    found = replace(found, recipes=(*found.recipes, narrow, graph))
    header, *body = rows(found, more=True)
    lines = [row(*header), row(*["---"] * len(header)), *(row(*one) for one in body)]
    note = f"{found.scored:,} tokens of `examples/tiny-v3/heldout.txt` in {found.windows} windows of {found.context}; "
    note += "`python benchmarks/recipes_quality.py`."
    picture = quality_chart(found)
    assert picture is not None
    svg.write_text(picture)
    replace_between(into, BEGIN, END, ["\n".join(lines), note])
    click.echo("\n".join([*lines, note]))


if __name__ == "__main__":
    main()
