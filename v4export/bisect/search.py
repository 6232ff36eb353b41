"""Where two graphs part: by binary search over cuts, between which both compute from the reference's values.

A cut at i is what the reference's first i nodes leave to those behind them, and what of that the graph returns. If two
graphs are alike at one cut and not at the next, the node between them does it: both have computed it of equal inputs.
Each probe slices both graphs between two cuts and has one set of new outputs; nothing else of a graph is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from v4export.bisect.difference import Difference, difference, expected_error
from v4export.bisect.graph import Arrays, Graph
from v4export.errors import V4Error

#: Nodes that differ within rounding and are passed while every bit is compared; behind them limits are what counts.
PASSED = 12


@dataclass(frozen=True)
class Parting:
    """What lies between two cuts at which two graphs part.

    Attributes:
        first, end: the cuts.
        nodes: numbers of the other graph's nodes between them; one, unless cuts between have no counterpart.
        differences: of the values behind them that differ, the largest ahead.
        error: relative to a vector, what rounding explains of them.
        amplified: each half of what is between is within its limits by itself: rounding, that grows on the way.
        given: values that the other graph's nodes read.
        wanted: the reference's values behind them.
    """

    first: int
    end: int
    nodes: tuple[int, ...]
    differences: tuple[Difference, ...]
    error: float
    given: Mapping[str, np.ndarray] = field(repr=False)
    wanted: Mapping[str, np.ndarray] = field(repr=False)
    amplified: bool = False

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.amplified or all(one.ok for one in self.differences)

    @property
    def excess(self) -> float:
        """How many times its limit the largest difference is."""
        return max(one.excess for one in self.differences)


class Pair:
    """Two graphs whose values have the same names: a reference, and another one that is to compute the same.

    Args:
        reference, other: the graphs.
        exact: whether they part where a bit differs, or where rounding no longer explains it.
    """

    def __init__(self, reference: Graph, other: Graph, exact: bool) -> None:
        self.reference, self.other, self.exact = reference, other, exact
        self._known: dict[str, np.ndarray] = {}
        self._every_bit = exact
        last = {name: i for i, read in enumerate(reference.reads) for name in read}
        last |= dict.fromkeys(reference.outputs, len(reference.nodes))
        self._last = last
        self._probed: dict[tuple[int, int], Parting | None] = {}

    def feed(self, inputs: Arrays) -> None:
        """From here on both compute from these inputs of the graph."""
        self._known, self._probed, self._every_bit = dict(inputs), {}, self.exact

    def narrow(self, first: int, end: int, cuts: Sequence[int]) -> Parting | None:
        """The first two of ``cuts``, and of the ends, between which the graphs part; None where they do not."""
        found = self.probe(first, end)
        while found:
            first, end = found.first, found.end
            between = sorted((c for c in cuts if first < c < end), key=lambda c: abs(2 * c - first - end))
            middle = next((c for c in between if self._comparable(first, c)), None)
            if middle is None:
                return found
            ahead = self.probe(first, middle)
            behind = None if ahead else self.probe(middle, end)
            if ahead is None and behind is None:
                return replace(found, amplified=True)
            found = ahead or behind
        return None

    def search(self, first: int, end: int, boundaries: Iterable[int]) -> tuple[Parting | None, list[Parting]]:
        """The first node beyond its limit, None where there is none; and those ahead of it that rounding explains."""
        passed: list[Parting] = []
        boundaries = [cut for cut in boundaries if first < cut < end]
        while first < end:
            if self._every_bit and len(passed) >= PASSED:
                self._every_bit, self._probed = False, {}
            found = self.narrow(first, end, boundaries)
            if found is not None and not found.amplified:
                found = self.narrow(found.first, found.end, range(found.first, found.end))
            if found is None:
                break
            if not found.ok:
                return found, passed
            passed.append(found)
            first = found.end
        return None, passed

    def probe(self, first: int, end: int) -> Parting | None:
        """What both make of the reference's values at the cut ``first`` until the cut ``end``, if that differs."""
        if (first, end) not in self._probed:
            self._probed[first, end] = self._probe(first, end)
        return self._probed[first, end]

    def _probe(self, first: int, end: int) -> Parting | None:
        names = [name for name in self._made(first, end) if name in self.other.maker]
        known = self._known_at(first)
        # Both start at the same cut: a runtime that joins nodes across it would compute the last bits otherwise.
        wanted = self.reference.values(names, self._values(self.reference.needed(names, known)[1]))
        self._known |= wanted
        nodes, reads = self.other.needed(names, known)
        given = self._values(reads)
        try:
            found, failed = self.other.values(names, given), ""
        except V4Error as error:
            found, failed = {}, error.values or error.what
        expected = self._expected(first, end, nodes, given)
        compared = [difference(name, found.get(name), wanted[name], expected) for name in names]
        bad = [one for one in compared if not (one.equal if self._every_bit else one.ok)]
        if not bad:
            return None
        if failed:
            bad = [Difference(one.value, False, False, note=failed) for one in bad[:1]]
        bad.sort(key=lambda one: -one.excess)
        return Parting(first, end, tuple(nodes), tuple(bad), expected, given, wanted)

    def _values(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The reference's own values."""
        self._known |= self.reference.values([name for name in names if name not in self._known], self._known)
        return {name: self._known[name] for name in names}

    def _made(self, first: int, end: int) -> list[str]:
        """Names of what the reference makes between two cuts and what is behind the second reads, or it returns."""
        nodes = self.reference.nodes[first:end]
        return [name for node in nodes for name in node.output if name and self._last.get(name, -1) >= end]

    def _comparable(self, first: int, cut: int) -> bool:
        """Whether all that lives at a cut, of what is made since ``first``, is in both."""
        made = self._made(first, cut)
        return bool(made) and all(name in self.other.maker for name in made)

    def _known_at(self, first: int) -> Callable[[str], bool]:
        """Which values of the other graph are the reference's: all that this has made ahead of a cut."""
        maker, inputs = self.reference.maker, set(self.reference.inputs)
        return lambda name: maker.get(name, first) < first or name in inputs

    def _expected(self, first: int, end: int, nodes: Sequence[int], given: Arrays) -> float:
        """The error that rounding explains between two cuts, in the coarser of both graphs' types."""
        own = range(first, end)
        types = {int(self.other.dtype(name, array.dtype)) for name, array in given.items()}
        types |= {int(self.reference.dtype(name, array.dtype)) for name, array in given.items()}
        for graph, some in ((self.reference, own), (self.other, nodes)):
            weights = [graph.kept[n] for i in some for n in graph.reads[i] if n in graph.kept]
            types |= {w.data_type for w in weights if w.data_location == onnx.TensorProto.EXTERNAL}
        widths = [array.shape[-1] for array in given.values() if array.ndim]
        return expected_error(types, max(len(nodes), 1), sum(widths) + max(widths, default=1) * len(nodes))
