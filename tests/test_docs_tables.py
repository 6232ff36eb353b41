"""Tables in the documents are those that the program goes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from v4export.engine.targets import support_rows
from v4export.precision import format_rows, recipe_rows

PAGE = Path(__file__).parents[1] / "docs" / "precision.md"
TABLES: dict[str, Callable[[], list[tuple[str, ...]]]] = {
    "recipes": recipe_rows,
    "formats": format_rows,
    "targets": support_rows,
}


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], tuple("---" for _ in rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@pytest.mark.parametrize("name", TABLES)
def test_table(name):
    found = PAGE.read_text().split(f"<!-- table: {name} -->")[1].split(f"<!-- end: {name} -->")[0]
    assert found.strip() == markdown(TABLES[name]())
