"""Which value of one graph is which of another: by name, or by place in the order of the nodes.

Names are kept where nearly all that the graphs compute is called alike. Otherwise nodes of the same part, a layer or
the whole, are matched by the longest common runs of kinds (type, attributes' names, numbers of inputs and outputs), and
a match is kept only where something that is read is matched, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import onnx

from v4export.bisect.graph import Graph
from v4export.errors import BadInput
from v4export.graphs.trace import ROWS, THINK, THINK_MIX, THINK_STEP

#: Share of the reference's values that has to be in the other graph by name, for names to be what matches.
ALIKE = 0.9

#: Parts of graphs besides layers, as names of nodes begin.
PARTS = ("embed", "head", ROWS, THINK, THINK_STEP, THINK_MIX)


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
    """Numbers of the other's and the reference's nodes, part by part where both have the same parts."""
    ours, its = (_by_part(graph) for graph in (other, reference))
    if ours.keys() != its.keys():
        ours, its = ({"": list(range(len(graph.nodes)))} for graph in (other, reference))
    for part, own in ours.items():
        twins = its[part]
        kinds = [_kind(other.nodes[i]) for i in own], [_kind(reference.nodes[i]) for i in twins]
        for tag, a, a_end, b, b_end in SequenceMatcher(None, kinds[0], kinds[1], autojunk=False).get_opcodes():
            # As many of other kinds between two runs are matched, too: one of them may be what is wrong.
            if tag == "equal" or (tag == "replace" and a_end - a == b_end - b):
                yield from zip(own[a:a_end], twins[b:b_end], strict=True)


def _by_part(graph: Graph) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for i, part in enumerate(parts_of(graph.nodes)):
        found.setdefault(part, []).append(i)
    return found


def parts_of(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The layer or other part of each node, by the beginning of its name; where that says nothing, the one before."""
    found: list[str] = []
    for node in nodes:
        first, _, rest = node.name.partition(".")
        if first == "layers":
            found.append(f"layer {rest.split('.')[0]}")
        elif first in PARTS:
            found.append(first)
        else:
            found.append(found[-1] if found else "graph")
    return found


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
