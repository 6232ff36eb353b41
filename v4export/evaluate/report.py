"""What an evaluation leaves: eval.json, eval.md, eval.svg and layers.svg."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from v4export.evaluate.plot import Axis, Point, figure, lines, scatter
from v4export.evaluate.results import FP8_STATE, Evaluation, Quality, RecipeResult, rows, summary
from v4export.plain import to_json


def write(folder: Path, found: Evaluation) -> None:
    """Write the files into a folder that is there."""
    (folder / "eval.json").write_text(to_json(found) + "\n")
    (folder / "eval.md").write_text(markdown(found) + "\n")
    for name, picture in {"eval.svg": quality_chart(found), "layers.svg": layer_chart(found)}.items():
        if picture:
            (folder / name).write_text(picture)


def markdown(found: Evaluation) -> str:
    """The table, and what it is of."""
    header, *body = rows(found, more=True)
    table = [_line(header), _line(["---"] * len(header)), *map(_line, body)]
    return "\n".join([*table, "", f"{summary(found)}; {found.model}.", *(f"\n{note}." for note in found.notes)])


def quality_chart(found: Evaluation) -> str | None:
    """Divergence and change of perplexity against bytes; None where there is nothing to show."""
    there = {one.name: one for one in found.recipes if _is_shown(one)}
    if not there:
        return None
    unit, shift = ("GiB", 30) if max(one.bytes for one in there.values()) >= 2**31 else ("MiB", 20)
    size = Axis(f"weights, {unit}")
    base = {name: name.removesuffix(FP8_STATE) for name in there}
    ringed = {name: own for name, own in base.items() if own != name and own in there}

    def panel(y: Axis, of: Callable[[Quality], float], error: Callable[[Quality], float] | None = None) -> str:
        at = {name: (one.bytes / 2**shift, of(one.quality)) for name, one in there.items() if one.quality}
        dots = {name: point for name, point in at.items() if name not in ringed}
        bars = {name: error(q) for name in dots if error and (q := there[name].quality) and error(q) > 0}
        return scatter(size, y, dots, bars, {own: at[name] for name, own in ringed.items()})

    panels = (
        panel(Axis("KL divergence from float32, nats a token", log=True), lambda q: q.divergence),
        panel(Axis("change of perplexity, % ± error"), lambda q: 100 * q.change, lambda q: 100 * q.change_error),
    )
    note = "Rings: the same with cached rows in FP8." if ringed else ""
    return figure("What each recipe costs in quality", *panels, note=note)


def layer_chart(found: Evaluation) -> str | None:
    """Own and carried errors of every layer; None where there is nothing to show."""
    labels = {"own": "own error of a layer, relative", "carried": "error of all layers so far, relative"}
    panels = []
    for which, label in labels.items():
        series = _series(found, which)
        if not series:
            return None
        dashed = {n: n.removesuffix(FP8_STATE) for n in series if n.endswith(FP8_STATE)}
        panels.append(lines(Axis("layer"), Axis(label, log=True), series, dashed))
    return figure("Error of hidden states, layer by layer", *panels)


def _series(found: Evaluation, which: str) -> dict[str, list[Point]]:
    every = {one.name: [(float(e.layer), getattr(e, which)) for e in one.layers] for one in found.recipes}
    return {name: line for name, line in every.items() if line and all(0 < y < math.inf for _, y in line)}


def _is_shown(one: RecipeResult) -> bool:
    """A logarithm wants something above zero: the reference itself is not shown."""
    q = one.quality
    return q is not None and 0 < q.divergence < math.inf and math.isfinite(q.change)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
