"""In what a node differs from its counterpart: its kind, attributes, operands, weights, or its body."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from v4export.bisect.graph import Graph
from v4export.bisect.weights import same_bytes


def causes(reference: Graph, other: Graph, number: int) -> list[str]:
    """What is different about a node of the other graph, a line each; empty where nothing is."""
    node = other.nodes[number]
    twin = counterpart(reference, node)
    if twin is None:
        return ["the reference has no such node"]
    found = []
    if (node.domain, node.op_type) != (twin.domain, twin.op_type):
        found.append(f"it is {node.op_type}, the reference has {twin.op_type}")
    ours, theirs = ({a.name: a for a in one.attribute} for one in (node, twin))
    for name in sorted(ours.keys() | theirs.keys()):
        values = [_shown(some.get(name)) for some in (ours, theirs)]
        if values[0] != values[1]:
            found.append(f"{name} is {values[0]}, the reference has {values[1]}")
    found += _operands(reference, other, node, twin)
    if bodies(other, node) != bodies(reference, twin):
        found.append("its body is another one")
    return found


def counterpart(reference: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The reference's node that makes a value of the same name."""
    return next((reference.nodes[reference.maker[n]] for n in node.output if n in reference.maker), None)


def node_faults(reference: Graph, other: Graph) -> Iterator[tuple[int, list[str]]]:
    """Nodes of the other graph, in order, that are not as their counterpart, and in what."""
    for number in range(len(other.nodes)):
        if found := causes(reference, other, number):
            yield number, found


def _operands(reference: Graph, other: Graph, node: onnx.NodeProto, twin: onnx.NodeProto) -> list[str]:
    if len(node.input) != len(twin.input):
        return [f"it reads {len(node.input)} values, the reference's {len(twin.input)}"]
    found = []
    for i, (own, its) in enumerate(zip(node.input, twin.input, strict=True)):
        if own in other.kept and its in reference.kept:
            if own != its and own.split(".")[0] != "const":
                found.append(f"input {i} is {own}, the reference has {its}")
            elif not same_bytes(other.kept[own], other.folder, reference.kept[its], reference.folder):
                found.append(f"weight {own} has other bytes")
        elif own != its:
            found.append(f"input {i} is {own or 'absent'}, the reference has {its or 'none'}")
    return found


def _shown(attribute: onnx.AttributeProto | None) -> str:
    if attribute is None:
        return "absent"
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return np.array2string(numpy_helper.to_array(value), threshold=8)
    if isinstance(value, onnx.GraphProto):
        return f"a graph of {len(value.node)} nodes, {hash(value.SerializeToString(deterministic=True)):x}"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def bodies(graph: Graph, node: onnx.NodeProto) -> list[bytes]:
    """The function that a node calls and those that it calls, as bytes."""
    named = {(f.domain, f.name, f.overload): f for f in graph.model.functions}
    found, ahead = {}, [node]
    while ahead:
        one = ahead.pop()
        key = (one.domain, one.op_type, one.overload)
        if key in named and key not in found:
            found[key] = named[key].SerializeToString(deterministic=True)
            ahead.extend(named[key].node)
    return [found[key] for key in sorted(found)]
