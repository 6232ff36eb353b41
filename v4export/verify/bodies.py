"""Whether each custom node's portable body is the one that its attributes stand for.

What runs here is the body; an engine's plugin computes by the attributes. A node of which the two differ is one thing
to one runtime and another to the next, which no run of the body can show.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from v4export.graphs.stamp import portable_bodies
from v4export.plugins import BY_NODE


def body_faults(model: ir.Model) -> Iterator[str]:
    """What is wrong with the bodies of a portable graph, a line each."""
    held = {key: _bytes(function) for key, function in model.functions.items()}
    known: dict[tuple[object, ...], list[str]] = {}
    for node in model.graph:
        op = BY_NODE.get((node.domain, node.op_type))
        if op is None or op.function is None:
            continue
        # What a body is written from; nodes that agree in it have the same.
        types = tuple(None if value is None else value.dtype for value in node.inputs)
        attributes = tuple((name, str(a.value)) for name, a in sorted(node.attributes.items()))
        key = (node.domain, node.op_type, node.overload, attributes, types)
        if key not in known:
            known[key] = [f.name for f in portable_bodies([node]) if held.get(f.identifier()) != _bytes(f)]
        for name in known[key]:
            yield f"{node.name}: the body of {name} is not what the node's attributes say"


def _bytes(function: ir.Function) -> bytes:
    return ir.to_proto(function).SerializeToString(deterministic=True)
