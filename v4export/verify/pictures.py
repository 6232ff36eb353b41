"""Pictures of the report as shapes for SVG, in each picture's own units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from v4export.verify.boundary import PARTS, Boundary

WIDTH, MARGIN = 900, 40
#: Of the plot of errors, and of a row of the other two pictures.
HEIGHT, ROW = 220, 16
#: Where rows begin, behind their names, and how high the bars of one may be.
_INDENT, _BAR = 220, 13


@dataclass(frozen=True)
class Point:
    """A boundary in the plot of errors: where it stands, and the heights of its error and of its limit."""

    x: float
    error: float
    limit: float
    boundary: Boundary


@dataclass(frozen=True)
class Plot:
    """Points, and marks of the logarithmic axis: their height and what they say."""

    points: Sequence[Point]
    ticks: Sequence[tuple[float, str]]


def errors(boundaries: Sequence[Boundary]) -> Plot | None:
    """Error and limit of each boundary that has a limit; None where none has."""
    shown = [b for b in boundaries if b.limit > 0]
    if not shown:
        return None
    positive = [v for b in shown for v in (b.rel, b.limit) if 0 < v < math.inf]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))

    def y(value: float) -> float:
        exponent = high if math.isnan(value) else min(max(math.log10(value) if value > 0 else low, low), high)
        return HEIGHT - MARGIN - (exponent - low) / max(high - low, 1) * (HEIGHT - 2 * MARGIN)

    step = (WIDTH - 2 * MARGIN) / max(len(shown) - 1, 1)
    points = [Point(MARGIN + i * step, y(b.rel), y(b.limit), b) for i, b in enumerate(shown)]
    return Plot(points, [(y(10.0**e), f"1e{e}") for e in range(low, high + 1)])


@dataclass(frozen=True)
class Cell:
    """Vectors whose errors are in one part of their limits: how many, and how much of the row (0 to 1)."""

    x: float
    width: float
    count: int
    share: float
    beyond: bool


@dataclass(frozen=True)
class Line:
    """A row of a picture.

    Attributes:
        y: its upper edge.
        name: of the boundary.
        cells: of a histogram.
        bars: of a load, as an SVG path.
        says: in words.
    """

    y: float
    name: str
    cells: Sequence[Cell] = ()
    bars: str = ""
    says: str = ""


def histograms(boundaries: Sequence[Boundary]) -> list[Line]:
    """How the errors of each boundary's vectors spread below their limits, and beyond."""
    width = (WIDTH - _INDENT) / (len(PARTS) + 1)
    lines = []
    for number, b in enumerate(one for one in boundaries if sum(one.spread) and one.limit):
        cells = [
            Cell(_INDENT + i * width, width, count, count / sum(b.spread), i == len(PARTS))
            for i, count in enumerate(b.spread)
        ]
        lines.append(Line(ROW * (number + 1), b.name, cells))
    return lines


def heads() -> list[tuple[float, str]]:
    """Where the parts of a limit end in histograms, and what they are."""
    width = (WIDTH - _INDENT) / (len(PARTS) + 1)
    names = [f"1/{round(1 / part)}" if part < 1 else "limit" for part in PARTS]
    return [(_INDENT + (i + 1) * width, name) for i, name in enumerate(names)]


def loads(boundaries: Sequence[Boundary]) -> list[Line]:
    """How many tokens chose each expert of a layer, in the order of their numbers."""
    lines = []
    for number, b in enumerate(one for one in boundaries if sum(one.load)):
        most, width = max(b.load), (WIDTH - _INDENT) / len(b.load)
        floor = ROW * number + _BAR
        tall = [(_INDENT + i * width, _BAR * count / most) for i, count in enumerate(b.load) if count]
        bars = "".join(f"M{x:.1f} {floor}v{-high:.1f}h{0.8 * width:.2f}v{high:.1f}z" for x, high in tall)
        idle = b.load.count(0)
        even = sum(b.load) / len(b.load)
        says = f"{most} tokens at most, {even:.1f} if all had as many; {idle or 'no'} experts without one"
        lines.append(Line(ROW * number, b.name, bars=bars, says=says))
    return lines
