"""Within a custom op: the first node of its body that parts."""

from __future__ import annotations

import onnx.inliner

from v4export.bisect.cause import bodies, counterpart
from v4export.bisect.graph import Graph
from v4export.bisect.graphs import Bisected
from v4export.bisect.search import Pair, Parting


def first_inside(pair: Bisected, parting: Parting) -> str:
    """Name and kind of that node, where two nodes that read the same have different bodies or attributes; else nothing."""
    node = pair.other.nodes[parting.nodes[0]]
    twin = counterpart(pair.reference, node)
    if twin is None or node.input != twin.input or bodies(pair.reference, twin) == bodies(pair.other, node):
        return ""
    targets = [one.value for one in parting.differences]
    graphs = []
    for graph in (pair.reference, pair.other):
        inlined = onnx.inliner.inline_local_functions(graph.piece(targets, parting.given))
        graphs.append(Graph(inlined, graph.execute, graph.folder))
    within = Pair(*graphs, exact=True)
    within.feed(parting.given)
    found = within.narrow(0, len(graphs[0].nodes), range(len(graphs[0].nodes)))
    if found is None:
        return ""
    node = graphs[1].nodes[found.nodes[-1]]
    return f"{node.op_type} that makes {node.output[0]}"
