"""From where two graphs part to what is told of it, and to the case that shows it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from v4export.bisect.asked import Asked
from v4export.bisect.case import polygraphy_command, write_case
from v4export.bisect.graph import Graph
from v4export.bisect.graphs import Bisected
from v4export.bisect.inside import first_inside
from v4export.bisect.result import Bisection, Node
from v4export.bisect.search import Parting
from v4export.package.whole import whole_folder


def told(
    compared: str,
    pair: Bisected,
    parting: Parting,
    portable: bool,
    asked: Asked,
    passed: Sequence[str],
    unmatched: Sequence[str],
) -> Bisection:
    """Of a parting of two graphs; its case is written where that is asked for."""
    node = pair.described(parting)
    if portable and len(parting.nodes) == 1:
        node = replace(node, inside=first_inside(pair, parting))
    result = Bisection(compared, node.boundary, node, tuple(passed), tuple(unmatched))
    return _with_case(result, pair.other, parting, portable, asked.out)


def told_of_silent(compared: str, pair: Bisected, number: int, lines: Sequence[str]) -> Bisection:
    """A node is wrong and no number shows it: a weight no prompt reaches, or an attribute that only engines read."""
    node = pair.other.nodes[number]
    silent = Node(pair.name, node.name, node.op_type, pair.part(node.name), tuple(lines))
    return Bisection(compared, silent.boundary, silent, notes=("no number shows it: it was found by comparing nodes",))


def _with_case(result: Bisection, graph: Graph, parting: Parting, portable: bool, out: Path | None) -> Bisection:
    if out is None or result.node is None:
        return result
    facts: dict[str, Any] = {"node": result.node.name, "op_type": result.node.op_type, "graph": result.node.graph}
    facts |= {"compared": result.compared, "causes": list(result.node.causes)}
    with whole_folder(out, force=False) as folder:
        write_case(folder, graph, parting, portable, facts)
    commands = [shlex.join(["v4export", "bisect", "--replay", str(out)]), *filter(None, [polygraphy_command(out)])]
    return replace(result, case=str(out), commands=tuple(commands))
