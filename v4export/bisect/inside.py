"""Within a custom op: the first node of its body that parts."""

from __future__ import annotations

import onnx.inliner

from v4export.bisect.cause import bodies, counterpart
from v4export.bisect.graph import Graph
from v4export.bisect.graphs import Bisected
from v4export.bisect.search import Pair, Parting


def first_inside(pair: Bisected, parting: Parting) -> str:
    """Name and kind of that node, where two nodes read the same and their bodies differ; else nothing."""
    node = pair.other.nodes[parting.nodes[0]]
    twin = counterpart(pair.reference, node)
    if twin is None or node.input != twin.input or bodies(pair.reference, twin) == bodies(pair.other, node):
        return ""
    targets = [one.value for one in parting.differences]

    def inlined(graph: Graph) -> Graph:
        piece = onnx.inliner.inline_local_functions(graph.piece(targets, parting.given))
        return Graph(piece, graph.execute, graph.folder)

    reference, other = inlined(pair.reference), inlined(pair.other)
    within = Pair(reference, other, exact=True)
    within.feed(parting.given)
    found = within.narrow(0, len(reference.nodes), range(len(reference.nodes)))
    if found is None:
        return ""
    node = other.nodes[found.nodes[-1]]
    return f"{node.op_type} that makes {node.output[0]}"
