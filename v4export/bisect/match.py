"""Which value of one graph is which of another: by name, or by what it is computed from.

Names are kept where the graphs call all that they compute alike; of two exports of one model and precision it suffices
that most is, as the same exporter gave the names. Otherwise both are walked from their inputs: a
node is matched with one of its kind that reads the same, or most of the same. One of another kind is matched only where
what reads its result is matched; a conversion without a counterpart stands for what it converts. Results are matched
by name, or in order where there are as many, so that graphs are never called equal for lack of a counterpart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from v4export.bisect.graph import Graph
from v4export.errors import BadInput
from v4export.graphs.trace import ROWS, THINK, THINK_MIX, THINK_STEP

#: Of two exports of one model and precision, the share of values by which they are known to be that.
ALIKE = 0.5

#: Parts of graphs besides layers, as names of nodes begin.
PARTS = ("embed", "head", ROWS, THINK, THINK_STEP, THINK_MIX)

#: Nodes that hand on what they read.
_HANDS_ON = ("Cast", "Identity")


@dataclass(frozen=True)
class Match:
    """Names of the other graph's values in the reference, and what of it has no counterpart.

    Attributes:
        names: the other's name -> the reference's; empty where names are kept.
        unmatched: nodes of the other graph whose results have no counterpart, by name.
    """

    names: Mapping[str, str]
    unmatched: tuple[str, ...]


def match(reference: Graph, other: Graph, same_exporter: bool) -> Match:
    """Find what corresponds; ``same_exporter`` says that the names of both were given alike.

    Raises:
        BadInput: the inputs of the graphs are different ones, or no result corresponds.
    """
    inputs, outputs = (_ends(*ends) for ends in ((reference.inputs, other.inputs), (reference.outputs, other.outputs)))
    if len(inputs) < max(len(reference.inputs), len(other.inputs)):
        only = sorted(set(reference.inputs) ^ set(other.inputs))
        raise BadInput("the graphs have different inputs", ", ".join(only[:8]), "bisect graphs with equal inputs")
    if not outputs:
        values = f"{', '.join(other.outputs[:4])}; the reference has {', '.join(reference.outputs[:4])}"
        raise BadInput("no result of the graphs corresponds", values, "bisect graphs with equal outputs")
    common = reference.maker.keys() & other.maker.keys()
    share = ALIKE if same_exporter else 1
    if len(common) >= share * len(reference.maker) and all(name == own for name, own in (inputs | outputs).items()):
        lost = [_called(node) for node in other.nodes if not set(node.output) & common]
        return Match({}, tuple(lost))
    names = _Walk(reference, other, inputs, outputs).names
    lost = [_called(node) for node in other.nodes if not any(name in names for name in node.output)]
    # What stays without a counterpart may not be taken for a namesake.
    own = {name: f"other.{name}" for node in other.nodes for name in node.output if name and name not in names}
    return Match(names | own, tuple(lost))


def _ends(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, str]:
    """Inputs, or outputs, of the other graph and what they are in the reference."""
    if len(theirs) == len(ours) and set(theirs) != set(ours):
        return dict(zip(ours, theirs, strict=True))
    return {name: name for name in ours if name in theirs}


def _called(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


class _Walk:
    """Matches nodes in the order in which they are computed."""

    def __init__(self, reference: Graph, other: Graph, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        self.reference, self.other = reference, other
        self.names = dict(inputs)
        #: What a value without a counterpart may stand for.
        self.guesses: dict[str, list[str]] = {}
        self.free = set(range(len(reference.nodes)))
        self.readers: dict[str, list[int]] = defaultdict(list)
        for i, read in enumerate(reference.reads):
            for name in {*read, *map(self._handed_on, read)}:
                self.readers[name].append(i)
        for node in other.nodes:
            self._node(node)
        self.names |= outputs

    def _node(self, node: onnx.NodeProto) -> None:
        read = [self._means(name) for name in node.input]
        near = {i for some in read for name in some for i in self.readers[name]} & self.free
        if not any(read):
            near = {i for i in self.free if not any(self._is_computed(name) for name in self.reference.nodes[i].input)}
        alike = [i for i in near if _kind(self.reference.nodes[i]) == _kind(node)]
        if alike:
            self._confirm(node, max(alike, key=lambda i: (self._agreement(node, read, i), -i)))
            return
        others = sorted(i for i in near if len(self.reference.nodes[i].output) == len(node.output))
        for at, name in enumerate(node.output):
            handed_on = read[0] if node.op_type in _HANDS_ON and read else []
            self.guesses[name] = [*handed_on, *(self.reference.nodes[i].output[at] for i in others)]

    def _means(self, name: str) -> list[str]:
        return [self.names[name]] if name in self.names else self.guesses.get(name, [])

    def _handed_on(self, name: str) -> str:
        """What a value of the reference is a conversion of."""
        maker = self.reference.maker.get(name)
        node = None if maker is None else self.reference.nodes[maker]
        return self._handed_on(node.input[0]) if node is not None and node.op_type in _HANDS_ON else name

    def _is_computed(self, name: str) -> bool:
        return name in self.reference.maker or name in self.reference.inputs

    def _agreement(self, node: onnx.NodeProto, read: Sequence[Sequence[str]], number: int) -> float:
        """How much of what a node and a candidate read is the same; of equal ones, names and shapes of weights tell."""
        twin = self.reference.nodes[number]
        agreed = 0.0
        for own, its, means in zip(node.input, twin.input, read, strict=True):
            # What is certain counts more than a guess.
            agreed += (len(means) - means.index(its)) / len(means) if its in means else 0
            agreed += 0.9 if its not in means and self._handed_on(its) in means else 0
            kept = self.other.kept.get(own), self.reference.kept.get(its)
            if kept[0] is not None and kept[1] is not None:
                agreed += 0.5 * (own == its) + 0.1 * (list(kept[0].dims) == list(kept[1].dims))
        return agreed + 0.1 * (list(node.output) == list(twin.output))

    def _confirm(self, node: onnx.NodeProto, number: int) -> None:
        """Match two nodes; and those of different kinds whose results they read, if these may be each other."""
        twin = self.reference.nodes[number]
        self._pair(node, number)
        for own, its in zip(node.input, twin.input, strict=True):
            maker = self.reference.maker.get(its)
            if maker in self.free and its in self.guesses.get(own, []) and own not in self.names:
                self._pair(self.other.nodes[self.other.maker[own]], maker)

    def _pair(self, node: onnx.NodeProto, number: int) -> None:
        self.free.discard(number)
        outputs = zip(node.output, self.reference.nodes[number].output, strict=True)
        self.names |= {own: its for own, its in outputs if own}


def _kind(node: onnx.NodeProto) -> tuple[object, ...]:
    return node.domain, node.op_type, len(node.input), len(node.output)


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
