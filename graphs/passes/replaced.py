"""Nodes replaced by others that compute the same values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def replace(
    graph: ir.Graph, after: ir.Node, old: Sequence[ir.Node], new: Sequence[ir.Node],
    values: Sequence[ir.Value], results: Sequence[ir.Value],
) -> None:  # fmt: skip
    """Put new nodes behind one of the old ones, and their results in place of the old values, whose names, types and
    shapes they take over.
    """
    for node in old:
        _without_inputs(node)
    ir.convenience.replace_nodes_and_values(graph, after, list(old), list(new), list(values), list(results))


def _without_inputs(node: ir.Node) -> None:
    """Take all inputs from a node. onnx-ir makes the list of them anew for each, which a thousand experts notice."""
    for index, value in enumerate(node.inputs):
        if value is not None:
            value._remove_usage(node, index)
    node._inputs = ()
