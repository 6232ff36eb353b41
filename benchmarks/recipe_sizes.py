"""What each recipe weighs: bytes of the graph's weights, of the engine, and of the state for a token.

The model has a billion parameters, as DeepSeek-V3 has them; see ``subject.py``. Engines are built by TensorRT-RTX for
one target, without a GPU; nothing is run.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import onnx
from onnx.external_data_helper import ExternalDataInfo
from page import PAGE, replace_between, row
from subject import subject

from v4export import api
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.config.chosen import FP8, Chosen
from v4export.engine.options import EngineOptions
from v4export.engine.targets import TARGETS
from v4export.graphs.export import PORTABLE, graphs_in
from v4export.precision import PRECISIONS
from v4export.state_contract import bytes_per_token

BEGIN, END = "<!-- measured: recipe sizes -->", "<!-- end: recipe sizes -->"
MIB = 2**20
TEXT = Path(__file__).parent.parent / "examples" / "tiny-v3" / "heldout.txt"


def weight_bytes(folder: Path) -> int:
    """Bytes of files that a bundle's portable graphs read, each once."""
    regions = set()
    for name in graphs_in(folder):
        for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                info = ExternalDataInfo(tensor)
                regions.add((info.location, info.offset, info.length))
    return sum(length for _, _, length in regions)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a temporary one unless given.")
@click.option("--target", default="sm120", show_default=True)
@click.option("--recipe", "recipes", multiple=True, help="Only these.")
def main(folder: Path | None, target: str, recipes: tuple[str, ...]) -> None:
    here = folder or Path(tempfile.mkdtemp(prefix="recipe-sizes-"))
    config = replace(subject(), dtype="bfloat16")
    source = here / "hub"
    if not source.exists():
        synth(config, source)
    header = ("recipe", "weights", "bits a weight", "model.onnx", "engine")
    table = [row(*header), row(*("---" for _ in header))]
    total = api.inspect(source).parameters.total
    for name in recipes or PRECISIONS:
        table.append(row(f"`{name}`", *build(source, here / "out", name, target, total)))
        click.echo(table[-1])
        shutil.rmtree(here / "out")
    said = f"{total / 1e9:.2f}e9 parameters, engines for {target}; state: {states(config)}."
    if recipes:
        click.echo(said)
    else:
        replace_between(PAGE, BEGIN, END, [said, "\n".join(table)])
    if folder is None:
        shutil.rmtree(here)


def build(source: Path, out: Path, name: str, target: str, total: int) -> list[str]:
    """A row: the bundle and its engine, or why there is none."""
    recipe = PRECISIONS[name]
    there = next(t for t in TARGETS if t.name == target).has(recipe)
    options: dict[str, Any] = {"calibrate": TEXT} if recipe.inputs else {}
    engine = EngineOptions(targets=[target]) if there else None
    options |= {"verify": False, "scan_values": False, "force": True}
    built = api.build(source, out, precision=name, engine=engine, **options)
    size, report = weight_bytes(out), built.engines.get(PORTABLE)
    return [
        f"{size / MIB:,.0f} MiB",
        f"{8 * size / total:.2f}",
        f"{(out / PORTABLE).stat().st_size / MIB:.1f} MiB",
        f"{report.bytes / MIB:,.0f} MiB" if report else f"{target} has it not",
    ]


def states(config: ModelConfig) -> str:
    """Bytes for a token of each type of state."""
    narrow = Chosen(state=FP8).of(config)
    found = {"float32": (config, 4), "16 bits": (config, 2), "`--state fp8`": (narrow, 2)}
    return ", ".join(f"{bytes_per_token(c, size):,} bytes for a token in {name}" for name, (c, size) in found.items())


if __name__ == "__main__":
    main()
