"""A line chart as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Line = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 40, 55
COLOURS = ("#7a7a7a", "#1f6fb4", "#c2571a", "#3a8a4d")


def _ticks(low: float, high: float, about: int = 6) -> list[float]:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, x_label: str, y_label: str, groups: Mapping[str, Sequence[Line]]) -> str:
    """One colour a group: its lines thin, their mean thick with a mark at each point and the name at its end.

    Lines of a group have the same x.
    """
    points = [point for lines in groups.values() for line in lines for point in line]
    xs, ys = ([point[axis] for point in points] for axis in (0, 1))
    x_low, x_high, margin = 0.0, max(xs), 0.06 * (max(ys) - min(ys) or 1.0)
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, style: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'

    def path(line: Line, style: str) -> str:
        return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in line))}" {style}/>'

    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#222">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 24, title, 'font-size="15"'),
    ]
    for y in _ticks(y_low, y_high):
        _, height = at(0, y)
        out.append(f'<path d="M{LEFT} {height:.1f}H{right}" stroke="#e4e4e4"/>')
        out.append(text(LEFT - 8, height + 4, f"{y:.3g}", 'text-anchor="end"'))
    for x in _ticks(x_low, x_high):
        across, _ = at(x, y_low)
        out.append(f'<path d="M{across:.1f} {floor}v5" stroke="#444"/>')
        out.append(text(across, floor + 20, f"{x:.3g}", 'text-anchor="middle"'))
    out.append(f'<path d="M{LEFT} {TOP}V{floor}H{right}" fill="none" stroke="#444"/>')
    out.append(text((LEFT + right) / 2, HEIGHT - 14, x_label, 'text-anchor="middle"'))
    middle = (TOP + floor) / 2
    out.append(text(20, middle, y_label, f'text-anchor="middle" transform="rotate(-90 20 {middle})"'))
    for (name, lines), colour in zip(groups.items(), COLOURS, strict=False):
        out += [path(line, f'fill="none" stroke="{colour}" stroke-width="1" opacity="0.45"') for line in lines]
        mean = [(at_x[0][0], sum(y for _, y in at_x) / len(at_x)) for at_x in zip(*lines, strict=True)]
        out.append(path(mean, f'fill="none" stroke="{colour}" stroke-width="2.2"'))
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (at(*p) for p in mean)]
        end_x, end_y = at(*mean[-1])
        out.append(text(end_x + 10, end_y + 4, f"{name} {mean[-1][1]:.3f}", f'fill="{colour}"'))
    return "\n".join([*out, "</svg>"]) + "\n"
