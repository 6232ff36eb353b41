"""Bisects two graphs that are there: opens them, matches their values, and searches over what they are fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from v4export.bisect.cause import causes, counterpart
from v4export.bisect.graph import Arrays, Graph
from v4export.bisect.match import match, parts_of, renamed
from v4export.bisect.result import Node
from v4export.bisect.search import Pair, Parting


@dataclass(frozen=True)
class Sought:
    """What a search in two graphs came to.

    Attributes:
        parting: the first node that parts, and what it makes of which values; None where none does beyond its limit.
        passed: what differs within rounding, by the names of nodes.
    """

    parting: Parting | None
    passed: Mapping[str, Parting]


class Bisected:
    """Two graphs, opened and matched.

    Args:
        name: of the other's file.
        reference, other: the graphs.
        exact: every bit is compared, as both are run alike.
    """

    def __init__(self, name: str, reference: Graph, other: Graph, exact: bool) -> None:
        self.name, self.match = name, match(reference, other, exact)
        if self.match.names:
            other = Graph(renamed(other.model, self.match.names), other.execute, other.folder)
        self.reference, self.other = reference, other
        self._pair = Pair(reference, other, exact)
        self._parts = parts_of(reference.nodes)

    def search(self, feeds: Sequence[Arrays], only: str | None = None) -> Sought:
        """Over all feeds until one shows a node beyond its limit; ``only`` in a part of the graph, by its name."""
        starts = [i for i in range(1, len(self._parts)) if self._parts[i] != self._parts[i - 1]]
        inside = [i for i, part in enumerate(self._parts) if part == only]
        first, end = (inside[0], inside[-1] + 1) if inside else (0, len(self._parts))
        passed: dict[str, Parting] = {}
        for inputs in feeds if inside or only is None else ():
            self._pair.feed({name: array for name, array in inputs.items() if name in self.reference.inputs})
            found, within = self._pair.search(first, end, starts)
            if found:
                return Sought(found, passed)
            passed |= {self.other.nodes[self.blamed(one)].name: one for one in within}
        return Sought(None, passed)

    def blamed(self, parting: Parting) -> int:
        """Of the nodes between two cuts the first unlike its counterpart, else one that has none, else the last."""
        different = [i for i in parting.nodes if causes(self.reference, self.other, i)]
        known = [i for i in different if counterpart(self.reference, self.other.nodes[i])]
        return (known or different or parting.nodes[-1:])[0]

    def part(self, name: str) -> str:
        """The layer or other part of a node, by its name."""
        return parts_of([onnx.NodeProto(name=name)])[0]

    def described(self, parting: Parting) -> Node:
        """A parting for people."""
        number = self.blamed(parting)
        node = self.other.nodes[number]
        return Node(
            self.name,
            node.name or node.output[0],
            node.op_type,
            self._parts[parting.first],
            tuple(causes(self.reference, self.other, number)),
            parting.differences,
            tuple(self.other.nodes[i].name for i in parting.nodes) if len(parting.nodes) > 1 else (),
        )
