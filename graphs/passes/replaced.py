"""Nodes replaced by others that compute the same values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, Body


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


def replace_by_one(
    graph: ir.Graph, op_type: str, old: Sequence[ir.Node], inputs: Sequence[ir.Value | None], **attributes: object
) -> None:
    """A node of this project's in place of a chain of them, of which the last one's result is the only one read
    elsewhere.
    """
    last = old[-1]
    body = Body(f"{last.name or last.outputs[0].name}.")
    y = body.op(op_type, *inputs, domain=DOMAIN, **attributes)
    replace(graph, last, old, body.nodes, last.outputs, [y])


def _without_inputs(node: ir.Node) -> None:
    """Take all inputs from a node. onnx-ir makes the list of them anew for each, which a thousand experts notice."""
    for index, value in enumerate(node.inputs):
        if value is not None:
            value._remove_usage(node, index)
    node._inputs = ()
