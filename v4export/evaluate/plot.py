"""Charts as SVG, in light and dark: points with a name, and lines with a name at their end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 470, 380
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 44, 48
#: Room for names behind the ends of lines.
NAMES = 150
_LETTER, _LINE = 6.4, 13.0
_STYLE = """<style>
 svg { background: #fff; color: #24292f; font: 12px system-ui, sans-serif }
 text { fill: currentColor } .soft { fill: #6e7781 } .grid { stroke: #d8dee4 } .axis { stroke: #8c959f }
 @media (prefers-color-scheme: dark) {
  svg { background: #0d1117; color: #e6edf3 } .soft { fill: #9198a1 }
  .grid { stroke: #2a313c } .axis { stroke: #656c76 }
 }
</style>"""
#: Seen on white and on black.
COLOURS = ("#8c959f", "#2f81f7", "#e36209", "#2da44e", "#bf5af2", "#d1242f", "#1b9e9e", "#b58900", "#e0569b", "#7d8590")

Point = tuple[float, float]
#: Left, top, right and bottom.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """What stands on an axis, and whether it is logarithmic."""

    label: str
    log: bool = False

    def scale(self, values: Sequence[float], margin: float) -> tuple[Callable[[float], float], list[float]]:
        """From a value to 0 .. 1, and where ticks are."""
        low, high = (self._at(one) for one in (min(values), max(values)))
        spread = (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - margin * spread, high + margin * spread
        return lambda value: (self._at(value) - low) / (high - low), self._ticks(low, high)

    def _at(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _ticks(self, low: float, high: float) -> list[float]:
        if self.log:
            steps = (1, 2, 5) if high - low < 2.5 else (1,)
            decades = range(math.floor(low), math.ceil(high) + 1)
            every = [step * 10.0**decade for decade in decades for step in steps]
            return [one for one in every if low <= math.log10(one) <= high]
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def figure(title: str, *panels: str, note: str = "") -> str:
    """Panels side by side; a note goes below the title."""
    width = WIDTH * len(panels)
    placed = (f'<g transform="translate({i * WIDTH} 0)">{panel}</g>' for i, panel in enumerate(panels))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}">'
    titles = [_text(LEFT, 18, title, 'font-size="14" font-weight="600"'), _text(LEFT, 34, note, 'class="soft"')]
    return "\n".join([head, _STYLE, *titles, *placed, "</svg>"]) + "\n"


def scatter(
    x: Axis,
    y: Axis,
    points: Mapping[str, Point],
    errors: Mapping[str, float] | None = None,
    rings: Mapping[str, Point] | None = None,
) -> str:
    """A named dot each, with bars as long as their errors on both sides; rings, of the colour of the dot so named."""
    errors, rings = errors or {}, rings or {}
    ends = [py + sign * errors.get(name, 0.0) for name, (_, py) in points.items() for sign in (1, -1)]
    every = [*points.values(), *rings.values()]
    frame, at = _frame(x, y, [px for px, _ in every], [*ends, *(py for _, py in rings.values())], WIDTH - RIGHT)
    out: list[str] = [frame]
    taken: list[Box] = []
    colours = dict(zip(points, itertools.cycle(COLOURS)))
    for name, point in points.items():
        (cx, cy), colour = at(*point), colours[name]
        top, bottom = (at(point[0], point[1] + sign * errors.get(name, 0.0))[1] for sign in (1, -1))
        out.append(f'<path d="M{cx:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="1.5" opacity=".55"/>')
        out.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4.5" fill="{colour}"/>')
        taken += [(cx - 4, cy - 4, cx + 4, cy + 4), (cx - 1, top, cx + 1, bottom)]
    for name, point in rings.items():
        cx, cy = at(*point)
        out.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>'
        )
        taken.append((cx - 4, cy - 4, cx + 4, cy + 4))
    for name, point in points.items():
        box = _free(at(*point), _LETTER * len(name), taken)
        taken.append(box)
        out.append(_text(box[0], box[3] - 1.5, name, f'style="fill:{colours[name]}"'))
    return "\n".join(out)


def lines(x: Axis, y: Axis, series: Mapping[str, Sequence[Point]], dashed: Mapping[str, str] | None = None) -> str:
    """A line each, its name at its end; dashed ones have the colour of another."""
    dashed = dashed or {}
    every = [point for line in series.values() for point in line]
    right = WIDTH - NAMES
    frame, at = _frame(x, y, [px for px, _ in every], [py for _, py in every], right)
    out, ends = [frame], []
    own = dict(zip((name for name in series if name not in dashed), itertools.cycle(COLOURS)))
    for name, line in series.items():
        colour, places = own.get(dashed.get(name, name), COLOURS[0]), [at(*point) for point in line]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        dash = 'stroke-dasharray="4 3"' if name in dashed else ""
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" {dash}/>')
        out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.4" fill="{colour}"/>' for px, py in places]
        ends.append((places[-1][1], name, colour))
    lowest = -math.inf
    for i, (wanted, name, colour) in enumerate(sorted(ends)):
        # As high as leaves room for those below.
        lowest = max(min(wanted, HEIGHT - BOTTOM - _LINE * (len(ends) - 1 - i)), lowest + _LINE)
        out.append(f'<path d="M{right + 3} {wanted:.1f}L{right + 9} {lowest:.1f}" stroke="{colour}" fill="none"/>')
        out.append(_text(right + 12, lowest + 4, name, f'style="fill:{colour}"'))
    return "\n".join(out)


def _frame(
    x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float], right: float
) -> tuple[str, Callable[[float, float], Point]]:
    """Axes and grid, and from values to a place."""
    floor = HEIGHT - BOTTOM
    (across, x_ticks), (up, y_ticks) = x.scale(xs, 0.08), y.scale(ys, 0.1)

    def at(px: float, py: float) -> Point:
        return LEFT + across(px) * (right - LEFT), floor - up(py) * (floor - TOP)

    out = []
    for tick in y_ticks:
        height = floor - up(tick) * (floor - TOP)
        out.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
        out.append(_text(LEFT - 7, height + 4, f"{tick:g}", 'class="soft" text-anchor="end"'))
    for tick in x_ticks:
        width = LEFT + across(tick) * (right - LEFT)
        out.append(f'<path class="axis" d="M{width:.1f} {floor}v4"/>')
        out.append(_text(width, floor + 18, f"{tick:g}", 'class="soft" text-anchor="middle"'))
    out.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}" fill="none"/>')
    out.append(_text((LEFT + right) / 2, HEIGHT - 10, x.label, 'text-anchor="middle"'))
    middle = (TOP + floor) / 2
    out.append(_text(14, middle, y.label, f'text-anchor="middle" transform="rotate(-90 14 {middle})"'))
    return "\n".join(out), at


def _free(point: Point, width: float, taken: Sequence[Box]) -> Box:
    """Of some places around a point the one for a name that covers least of what is taken, or is outside."""
    x, y = point
    rings = [(x + 8, y), (x - 8 - width, y), (x - width / 2, y - 14), (x - width / 2, y + 14)]
    rings += [(x + 6, y - 12), (x - 6 - width, y - 12), (x + 6, y + 12), (x - 6 - width, y + 12)]
    rings += [(x - width / 2, y - 28), (x - width / 2, y + 28), (x + 6, y - 26), (x + 6, y + 26)]
    boxes = [(left, middle - 5.5, left + width, middle + 5.5) for left, middle in rings]
    frame = (LEFT + 2, TOP, WIDTH - 2, HEIGHT - BOTTOM - 2)

    def cost(place: int) -> float:
        covered = sum(_overlap(boxes[place], one) for one in taken)
        return covered + 2 * _outside(boxes[place], frame) + 2 * place  # the first are nearest

    return boxes[min(range(len(boxes)), key=cost)]


def _overlap(a: Box, b: Box) -> float:
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return across * down


def _outside(box: Box, frame: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


def _text(x: float, y: float, content: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'
