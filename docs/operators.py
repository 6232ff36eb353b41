"""Writes ``docs/operators.md``, the operator reference, from the operators' own pages: ``python docs/operators.py``."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).with_name("operators.md")
PLUGINS = Path(__file__).parents[1] / "plugins"
HEAD = """# Operators

Every custom operator of an exported graph: its equation, shapes and limits. A node has the portable body of its
operator beside it as a function of the model, so any runtime can compute it; where a runtime has something faster,
that takes its place (`v4export doctor --ops`). Letters are those of the
[legend](architecture.md#one-legend-of-letters). `docs/operators.py` puts this page together from
`plugins/*/README.md`.
"""


def text() -> str:
    """The page: a table of what is on it, and the operators' pages, a level down."""
    pages = {file.parent.name: file.read_text(encoding="utf-8") for file in sorted(PLUGINS.glob("*/README.md"))}
    pages = {name: page for name, page in pages.items() if (PLUGINS / name / "onnx.py").exists()}
    names = ", ".join(f"[{name}](#{name})" for name in pages)
    return "\n\n".join([HEAD.strip(), names, *(_below(page) for page in pages.values())]) + "\n"


def _below(page: str) -> str:
    """An operator's page with headings a level down, and links to other operators within this page."""
    page = re.sub(r"^#", "##", page.strip(), flags=re.MULTILINE)
    page = re.sub(r"\]\(\.\./(\w+)/README\.md\)", r"](#\1)", page)
    return re.sub(r"\]\(\.\./\.\./docs/([^)]*)\)", r"](\1)", page)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
