"""Graphs in pieces: at the layers where a pipeline's stages meet, and at the sums that ranks have to exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from v4export.graphs.types import infer
from v4export.plugins.all_reduce.onnx import OP_TYPE as SUM

#: From a node to the number of its piece; None of what is computed again wherever it is needed.
PieceOf = Callable[[onnx.NodeProto], int | None]


@dataclass(frozen=True)
class Segment:
    """What a rank computes between two exchanges.

    Attributes:
        model: a graph; what it reads of earlier segments are inputs, what later ones read of it are outputs.
        sums: values to be summed over the ranks behind it: the name of the summand and that of the sum.
    """

    model: onnx.ModelProto
    sums: tuple[tuple[str, str], ...] = ()


def split(model: onnx.ModelProto, piece_of: PieceOf, count: int) -> list[onnx.ModelProto]:
    """The graph in ``count`` pieces, each of which reads what earlier ones return; weights are still references.

    Values that cross have to have types. A piece that would return nothing is a graph without nodes.
    """
    nodes, graph = list(model.graph.node), model.graph
    pieces = [piece_of(node) for node in nodes]
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    types = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    returned = {value.name for value in graph.output}
    members = [_members(nodes, pieces, maker, number) for number in range(count)]
    made_by = {
        name: number
        for number, own in enumerate(members)
        for i in own
        if pieces[i] is not None
        for name in nodes[i].output
    }
    made = [{name for i in own for name in nodes[i].output} for own in members]
    read = [{name for i in own for name in reads(nodes[i])} for own in members]
    crossing = {name for number in range(count) for name in read[number] - made[number] if name in made_by}
    found = []
    for number, own in enumerate(members):
        outputs = [n for i in own for n in nodes[i].output if n in crossing | returned and made_by.get(n) == number]
        inputs = [v.name for v in graph.input if v.name in read[number]]
        inputs += sorted((read[number] & crossing) - made[number], key=lambda n: maker[n])
        piece = onnx.ModelProto()
        piece.CopyFrom(model)
        del piece.graph.node[:], piece.graph.input[:], piece.graph.output[:], piece.graph.value_info[:]
        del piece.graph.initializer[:]
        piece.graph.node.extend(nodes[i] for i in own)
        piece.graph.input.extend(types[name] for name in inputs)
        piece.graph.output.extend(types.get(name) or onnx.ValueInfoProto(name=name) for name in outputs)
        piece.graph.initializer.extend(t for t in graph.initializer if t.name in read[number])
        inside = made[number] - set(outputs)
        piece.graph.value_info.extend(v for v in graph.value_info if v.name in inside)
        used = called(piece)
        kept = [f for f in model.functions if (f.domain, f.name, f.overload) in used]
        del piece.functions[:]
        piece.functions.extend(kept)
        found.append(piece)
    return found


def segments(model: onnx.ModelProto) -> list[Segment]:
    """A rank's graph cut at its sums, in the order in which they are exchanged.

    A node is computed as late as what reads it allows, so that little has to be kept from one segment to the next.
    """
    nodes = list(model.graph.node)
    earliest: dict[str, int] = {}
    for node in nodes:
        own = max((earliest.get(name, 0) for name in reads(node)), default=0)
        earliest |= dict.fromkeys(node.output, own + (node.op_type == SUM))
    latest: dict[str, int] = {}
    number: dict[str, int | None] = {}
    for node in reversed(nodes):
        first = max((earliest.get(name, 0) for name in reads(node)), default=0)
        own = (
            first
            if node.op_type == SUM
            else max(first, min((latest[n] for n in node.output if n in latest), default=first))
        )
        number[node.output[0]] = None if node.op_type == "Constant" else own
        for name in reads(node):
            latest[name] = min(latest.get(name, own), own)
    sums = [node for node in nodes if node.op_type == SUM]
    exchanged = {number[node.output[0]]: [] for node in sums}  # type: dict[int | None, list[tuple[str, str]]]
    for node in sums:
        exchanged[number[node.output[0]]].append((node.input[0], node.output[0]))
    cut = _without_sums(model, sums)
    count = 1 + max((own for own in number.values() if own is not None), default=0)
    parts = split(cut, lambda node: number[node.output[0]], count)
    return [Segment(part, tuple(exchanged.get(i, ()))) for i, part in enumerate(parts)]


def _without_sums(model: onnx.ModelProto, sums: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The same with summands as outputs, and sums as inputs, of the whole; every value has a type."""
    cut = infer(model)
    types = {value.name: value for value in (*cut.graph.value_info, *cut.graph.output)}
    del cut.graph.node[:]
    cut.graph.node.extend(node for node in model.graph.node if node.op_type != SUM)
    there = {value.name for value in model.graph.output}
    cut.graph.output.extend(types[n.input[0]] for n in sums if n.input[0] not in there)
    cut.graph.input.extend(types[n.output[0]] for n in sums)
    return cut


def _members(
    nodes: Sequence[onnx.NodeProto], pieces: Sequence[int | None], maker: dict[str, int], number: int
) -> list[int]:
    """Nodes of a piece in their order: its own, and of those that belong to none what they need."""
    found = {i for i, piece in enumerate(pieces) if piece == number}
    ahead = list(found)
    while ahead:
        for name in reads(nodes[ahead.pop()]):
            i = maker.get(name)
            if i is not None and pieces[i] is None and i not in found:
                found.add(i)
                ahead.append(i)
    return sorted(found)


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs take from around it included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own |= {name for inner in graph.node for name in inner.output}
            yield from (value.name for value in graph.output if value.name not in own)
            yield from (name for inner in graph.node for name in reads(inner) if name not in own)


def called(model: onnx.ModelProto) -> set[tuple[str, str, str]]:
    """Functions that a graph's nodes call, and those that these call."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    found: set[tuple[str, str, str]] = set()
    ahead = list(model.graph.node)
    while ahead:
        node = ahead.pop()
        key = (node.domain, node.op_type, node.overload)
        if key in functions and key not in found:
            found.add(key)
            ahead.extend(functions[key].node)
        for attribute in node.attribute:
            ahead.extend(attribute.g.node)
    return found
