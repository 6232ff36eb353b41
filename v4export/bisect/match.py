"""Which value of one graph is which of another: by name, or by place in the order of the nodes.

Names are kept where most of what the graphs compute is called alike. Otherwise nodes are matched by the longest common
run of kinds (type, attributes' names, inputs, outputs), and a match is kept only where its inputs match, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

import onnx

from v4export.bisect.graph import Graph
from v4export.errors import BadInput

#: Share of the reference's values that has to be in the other graph by name, for names to be what matches.
ALIKE = 0.5


@dataclass(frozen=True)
class Match:
    """Names of the other graph's values in the reference, and what of it has no counterpart.

    Attributes:
        names: the other's name -> the reference's; empty where names are kept.
        unmatched: nodes of the other graph whose results have no counterpart, by name.
    """

    names: Mapping[str, str]
    unmatched: tuple[str, ...]


def match(reference: Graph, other: Graph) -> Match:
    """Find what corresponds.

    Raises:
        BadInput: the inputs of the graphs are different ones.
    """
    common = reference.maker.keys() & other.maker.keys()
    inputs = _inputs(reference, other)
    if len(common) >= ALIKE * len(reference.maker) and all(name == own for name, own in inputs.items()):
        lost = [node.name or node.output[0] for node in other.nodes if not set(node.output) & common]
        return Match({}, tuple(lost))
    names, lost = dict(inputs), []
    # What stays without a counterpart may not be taken for a namesake.
    pairs = dict(_aligned(reference, other))
    for number, node in enumerate(other.nodes):
        twin = reference.nodes[pairs[number]] if number in pairs else None
        if twin is not None and _agree(node, twin, names, reference):
            names |= {own: its for own, its in zip(node.output, twin.output, strict=True) if own}
        else:
            names |= {own: f"other.{own}" for own in node.output if own}
            lost.append(node.name or node.output[0])
    return Match(names, tuple(lost))


def _inputs(reference: Graph, other: Graph) -> dict[str, str]:
    ours, theirs = reference.inputs, other.inputs
    if set(ours) == set(theirs):
        return {name: name for name in ours}
    if len(ours) != len(theirs):
        only = sorted(set(ours) ^ set(theirs))
        raise BadInput("the graphs have different inputs", ", ".join(only[:8]), "bisect graphs with equal inputs")
    return dict(zip(theirs, ours, strict=True))


def _aligned(reference: Graph, other: Graph) -> Iterator[tuple[int, int]]:
    """Numbers of the other's and the reference's nodes; as many of other kinds between two runs are matched, too."""
    ours, its = ([_kind(node) for node in graph.nodes] for graph in (other, reference))
    for tag, a, a_end, b, b_end in SequenceMatcher(None, ours, its, autojunk=False).get_opcodes():
        if tag == "equal" or (tag == "replace" and a_end - a == b_end - b):
            yield from zip(range(a, a_end), range(b, b_end), strict=True)


def _kind(node: onnx.NodeProto) -> tuple[object, ...]:
    return node.domain, node.op_type, tuple(sorted(a.name for a in node.attribute)), len(node.input), len(node.output)


def _agree(node: onnx.NodeProto, twin: onnx.NodeProto, names: Mapping[str, str], reference: Graph) -> bool:
    """Whether a node reads something that its twin reads; not all need be so, as a wrong operand is looked for."""
    if len(node.output) != len(twin.output):
        return False
    computed = [name for name in twin.input if name in reference.maker or name in reference.inputs]
    return not computed or bool({names.get(own) for own in node.input} & set(computed))


def renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """A copy in which values are called as ``names`` says, in subgraphs as well."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _rename(copy.graph, names)
    return copy


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for listed in (node.input, node.output):
            for i, name in enumerate(listed):
                listed[i] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)
