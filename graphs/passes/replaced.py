"""Nodes replaced by others that compute the same values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def replace(
    graph: ir.Graph, after: ir.Node, old: Sequence[ir.Node], new: Sequence[ir.Node],
    values: Sequence[ir.Value], results: Sequence[ir.Value],
) -> None:  # fmt: skip
    """Put new nodes behind one of the old ones, and their results in place of the old values.

    Results take over names, types and shapes; an old value may not bear the same name while both are there.
    """
    for result, value in zip(results, values, strict=True):
        result.name, result.type, result.shape = value.name, value.type, value.shape
        value.name = f"{value.name}.replaced"
    ir.convenience.replace_nodes_and_values(graph, after, list(old), list(new), list(values), list(results))
