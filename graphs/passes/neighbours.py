"""Nodes by what they hand to each other: how a pass follows a pattern through a graph."""

from __future__ import annotations

import onnx_ir as ir


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def read_by(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The only reader of a node's first result, if it is of that type. What a graph returns is read by others, too."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    readers = list(node.outputs[0].uses())
    return readers[0].node if len(readers) == 1 and readers[0].node.op_type == op_type else None
