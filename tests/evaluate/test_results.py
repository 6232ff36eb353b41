"""Figures, tables and charts of results that are not all well."""

from __future__ import annotations

import itertools
import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from v4export.evaluate.plot import Axis, figure, lines, scatter
from v4export.evaluate.report import write
from v4export.evaluate.results import Evaluation, LayerError, Quality, RecipeResult, rows

SVG = "{http://www.w3.org/2000/svg}"


def tokens(count: int = 50, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    reference = rng.uniform(0, 6, count)
    moved = rng.normal(0, 0.1, count)
    return np.stack([reference, reference + moved, moved**2, rng.integers(0, 2, count), -moved], 1)


def found(quality: Quality) -> Evaluation:
    layers = (LayerError(0, "dense", 0.01, 0.01), LayerError(1, "routed", 0.03, 0.04))
    same = tokens()
    same[:, 1], same[:, 2] = same[:, 0], 0
    reference = RecipeResult("fp32", 4 << 20, 32.0, 100, (), Quality.of(same))
    recipe = RecipeResult("fp16", 2 << 20, 16.0, 50, layers, quality)
    return Evaluation("M", "T", 100, 2, 26, 50, 2, 2, (reference, recipe))


def test_change_is_judged_token_by_token():
    quality = Quality.of(tokens())
    assert quality.change_error < quality.perplexity_error / quality.perplexity / 5
    longer = Quality.of(np.tile(tokens(), (100, 1)))
    assert longer.perplexity == pytest.approx(quality.perplexity)
    assert longer.change_error == pytest.approx(quality.change_error / 10, rel=0.02)


def test_numbers_that_overflow_are_shown_and_are_strict_json(tmp_path):
    broken = tokens()
    broken[7, 1:] = math.nan
    quality = Quality.of(broken)
    layers = (LayerError(0, "dense", math.nan, math.nan),)
    whole = found(quality)
    whole = replace(whole, recipes=(whole.recipes[0], replace(whole.recipes[1], layers=layers)))
    assert "nan" in rows(whole)[2][4] and whole.recipes[1].worst == layers[0]
    write(tmp_path, whole)
    stored = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert stored["recipes"][1]["quality"]["perplexity"] is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval.json", "eval.md"]
    assert math.isinf(Quality.of(np.full((2, 5), 1e9)).perplexity)


def test_one_token_has_no_standard_error():
    assert math.isnan(Quality.of(tokens(1)).perplexity_error)


def test_charts_place_every_point_within_their_frame(tmp_path):
    write(tmp_path, found(Quality.of(tokens())))
    for name in ("eval.svg", "layers.svg"):
        drawn = ElementTree.parse(tmp_path / name).getroot()
        width, height = float(drawn.get("width")), float(drawn.get("height"))
        circles = list(drawn.iter(SVG + "circle"))
        assert circles
        assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles)


def test_names_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    points = {f"recipe {i}": (float(x), float(y)) for i, (x, y) in enumerate(rng.uniform(1, 9, (8, 2)))}
    drawn = ElementTree.fromstring(figure("T", scatter(Axis("x"), Axis("y", log=True), points)))
    boxes = [
        (float(t.get("x")), float(t.get("y")), 6.4 * len(t.text)) for t in drawn.iter(SVG + "text") if t.text in points
    ]
    assert len(boxes) == len(points)
    for i, (x, y, width) in enumerate(boxes):
        assert not any(abs(x - a) < min(width, w) and abs(y - b) < 9 for a, b, w in boxes[:i])


def test_a_logarithmic_axis_places_decades_evenly():
    line = {"one": [(0.0, 1e-3), (1.0, 1e-2), (2.0, 1e-1)]}
    drawn = ElementTree.fromstring(figure("T", lines(Axis("x"), Axis("y", log=True), line)))
    ys = [float(c.get("cy")) for c in drawn.iter(SVG + "circle")]
    assert ys[0] > ys[1] > ys[2] and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_names_of_many_lines_stay_within_the_frame():
    series = {f"line {i}": [(0.0, 1.0), (1.0, 1.0 + i / 1000)] for i in range(20)}
    drawn = ElementTree.fromstring(figure("T", lines(Axis("x"), Axis("y"), series)))
    ys = sorted(float(t.get("y")) for t in drawn.iter(SVG + "text") if t.text in series)
    assert len(ys) == 20 and ys[-1] < float(drawn.get("height")) - 40
    assert min(b - a for a, b in itertools.pairwise(ys)) > 12
