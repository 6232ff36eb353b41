"""The report of a build: ``report.json`` for programs, ``report.html`` for people, readable without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from v4export.config import ModelConfig
from v4export.engine.build import EngineReport
from v4export.package.bundle import versions
from v4export.plain import to_json
from v4export.verify import pictures
from v4export.verify.boundary import Boundary
from v4export.verify.verification import Verification

JSON = "report.json"
HTML = "report.html"

_NAME = 22  # characters of the longest name in a model of less than ten layers

#: How a boundary's verdict is shown.
MARKS = {"PASS": "✓", "FAIL": "✗", "AMBIGUOUS": "~"}


def write_report(
    folder: Path,
    facts: Mapping[str, Any],
    config: ModelConfig,
    verification: Verification | None,
    engines: Mapping[str, EngineReport],
    costs: Sequence[Any] = (),
) -> None:
    """Write both forms into ``folder``.

    Args:
        folder: of the bundle.
        facts: the manifest's.
        config: the model.
        verification: how the graph compares with the PyTorch definition.
        engines: what TensorRT built of each graph, by the graph's name.
        costs: what each stage was foreseen to take, and took (``v4export.plan.foreseen.Cost``).
    """
    content = {
        "verdict": verification.summary() if verification else "NOT VERIFIED",
        "facts": {**facts, "versions": versions()},
        "verification": verification,
        "engines": engines,
        "costs": costs,
    }
    (folder / JSON).write_text(to_json(content) + "\n")
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(Path(__file__).with_name("report.jinja").read_text())
    boundaries = verification.boundaries if verification else ()
    (folder / HTML).write_text(
        page.render(
            **content,
            config=config,
            boundaries=boundaries,
            marks=MARKS,
            pictures=pictures,
            reasons=Counter(facts["audit"]["skipped_tensors"].values()),
        )
    )


def line(boundary: Boundary, precision: str) -> str:
    """A boundary as one line of text."""
    b = boundary
    mark = MARKS[b.verdict]
    if b.ok and not b.limit:
        return f"[{mark}] {b.name:<{_NAME}} {b.derivation}"
    parts = [f"[{mark}] {b.name:<{_NAME}} max|Δ| {b.max_abs:.1e}  rel {b.rel:.1e}  cos {b.cos:.6f}"]
    parts.append(f"  (limit {b.limit:.1e}, {precision})")
    if b.carried is not None:
        parts.append(f"  carried {b.carried:.1e}")
    if b.weights:
        parts.append(f"  weights {b.weights:.1e}")
    if b.experts:
        parts.append(f"  {b.experts[0]}/{b.experts[1]} experts")
    if b.selective:
        parts.append(f"  {b.selective[0]}/{b.selective[1]} tokens selected among more")
    if b.ties:
        parts.append(f"  {b.ties} near-ties")
    return "".join(parts) + "".join(f"\n      {note}" for note in b.notes)
