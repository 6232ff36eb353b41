"""The page that measurements are written into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def replace_between(page: Path, begin: str, end: str, tables: Sequence[str]) -> None:
    """Put new tables between two marks."""
    before, rest = page.read_text().split(begin)
    page.write_text("\n\n".join([before + begin, *tables, end + rest.split(end)[1]]))


def row(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
