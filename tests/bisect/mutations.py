"""Single faults that can be planted in an exported graph or in its weights, and the nodes that are at fault then.

Each kind looks a graph through for the places where it can be planted; each place is one fault. A weight is changed
where it lies, in the bundle's own file, so that only numbers can show it; a graph is lowered again for onnxruntime,
so that both of its forms have the fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from damaged import Damaged
from onnx import helper, numpy_helper

Plant = Callable[[Damaged], None]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: of fault.
        place: what it is planted in.
        nodes: names of the nodes that it makes wrong.
        plant: does it to a copy of the bundle.
    """

    kind: str
    place: str
    nodes: tuple[str, ...]
    plant: Plant


@dataclass(frozen=True)
class Site:
    """A graph to be looked through.

    Attributes:
        model: the graph.
        weights: names of external weights, and the names of the nodes that read each.
        lowered: onnxruntime's copy of it.
    """

    model: onnx.ModelProto
    weights: dict[str, tuple[str, ...]]
    lowered: onnx.ModelProto | None = None

    @classmethod
    def of(cls, model: onnx.ModelProto, lowered: onnx.ModelProto | None = None) -> Site:
        external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        readers: dict[str, list[str]] = {name: [] for name in external}
        for node in model.graph.node:
            for name in node.input:
                if name in readers and node.name not in readers[name]:
                    readers[name].append(node.name)
        return cls(model, {name: tuple(nodes) for name, nodes in readers.items() if nodes}, lowered)

    def tensor(self, name: str) -> onnx.TensorProto:
        return next(t for t in self.model.graph.initializer if t.name == name)


Kind = Callable[[Site], Iterator[Fault]]

#: In the names of experts' weights.
EXPERTS = ".experts."

_WIDTH = {1: np.uint32, 10: np.uint16, 16: np.uint16, 17: np.uint8, 3: np.uint8, 2: np.uint8}


def rewrite(weight: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change a weight's numbers, as integers of their width, in a copy of the file that it lies in."""

    def plant(d: Damaged) -> None:
        tensor, place = d.pointer(weight), d.place(weight)
        file = d.folder / place["location"]
        data, offset, size = bytearray(file.read_bytes()), int(place["offset"]), int(place["length"])
        numbers = np.frombuffer(bytes(data[offset : offset + size]), _WIDTH[tensor.data_type]).reshape(tensor.dims)
        data[offset : offset + size] = np.ascontiguousarray(change(numbers)).tobytes()
        file.unlink()  # it is shared with the sound bundle, or with the checkpoint
        file.write_bytes(data)

    return plant


def of_weights(
    kind: str, change: Callable[[np.ndarray], np.ndarray], fits: Callable[[list[int]], bool], named: str = ""
) -> Kind:
    """A kind of fault of the bytes of weights whose shape fits; of experts only where ``named`` says so."""

    def look(site: Site) -> Iterator[Fault]:
        for name, nodes in site.weights.items():
            shape = [d for d in site.tensor(name).dims if d != 1]
            if (
                (named in name if named else EXPERTS not in name)
                and fits(shape)
                and site.tensor(name).data_type in _WIDTH
            ):
                yield Fault(kind, name, nodes, rewrite(name, change))

    return look


def _transposed(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


def _halves(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: np.roll(a, a.shape[axis] // 2, axis)


def _negated(a: np.ndarray) -> np.ndarray:
    return a ^ np.array(1 << (8 * a.dtype.itemsize - 1), a.dtype)


def _matrix(shape: list[int]) -> bool:
    return len(shape) == 2


def _vector(shape: list[int]) -> bool:
    return len(shape) == 1


def on_nodes(
    kind: str, change: Callable[[Site, onnx.NodeProto], Callable[[Damaged, onnx.NodeProto], None] | None]
) -> Kind:
    """A kind of fault of single nodes: ``change`` says what is to be done to one, or None."""

    def look(site: Site) -> Iterator[Fault]:
        for node in site.model.graph.node:
            how = change(site, node)
            if how is not None:

                def plant(d: Damaged, name: str = node.name, how: Callable[..., None] = how) -> None:
                    how(d, next(n for n in d.model.graph.node if n.name == name))

                yield Fault(kind, f"{node.op_type} {node.name}", (node.name,), plant)

    return look


def _attribute(kind: str, op_types: tuple[str, ...], name: str, value: Callable[[float], float]) -> Kind:
    """A kind of fault of one attribute of nodes of some types."""

    def change(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        found = next((a for a in node.attribute if a.name == name), None)
        if found is None or (op_types and node.op_type not in op_types):
            return None
        was = helper.get_attribute_value(found)
        if type(was) not in (int, float) or value(was) == was:
            return None

        def how(_: Damaged, one: onnx.NodeProto) -> None:
            next(a for a in one.attribute if a.name == name).CopyFrom(helper.make_attribute(name, value(was)))

        return how

    return on_nodes(kind, change)


def _everywhere(kind: Kind, name: str) -> Kind:
    """The same of all nodes of a type, and of the bodies that are written from them: what a wrong exporter makes."""

    def look(site: Site) -> Iterator[Fault]:
        by_type: dict[str, list[Fault]] = {}
        for fault in kind(site):
            by_type.setdefault(fault.place.split()[0], []).append(fault)
        for op_type, some in by_type.items():

            def plant(d: Damaged, some: list[Fault] = some) -> None:
                for fault in some:
                    fault.plant(d)
                d.rebuild()

            yield Fault(name, f"all {op_type}", tuple(f.nodes[0] for f in some), plant)

    return look


def _becomes(kind: str, pairs: dict[str, str]) -> Kind:
    def change(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        if node.op_type not in pairs or node.domain:
            return None
        return lambda _, one: setattr(one, "op_type", pairs[one.op_type])

    return on_nodes(kind, change)


def _swapped_inputs(kind: str, op_type: str, first: int, second: int) -> Kind:
    def change(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        if node.op_type != op_type or len(node.input) <= second:
            return None

        def how(_: Damaged, one: onnx.NodeProto) -> None:
            one.input[first], one.input[second] = one.input[second], one.input[first]

        return how

    return on_nodes(kind, change)


def _experts(kind: str, order: Callable[[int, int], list[int]]) -> Kind:
    """The matrices of experts, gates, ups and downs one behind the other, in another order: of 3·E numbers."""

    def change(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        if node.op_type != "MoeExperts":
            return None
        E = next(a.i for a in node.attribute if a.name == "num_experts")

        def how(_: Damaged, one: onnx.NodeProto) -> None:
            matrices = list(one.input[3 : 3 + 3 * E])
            for i, j in enumerate(order(E, len(matrices))):
                one.input[3 + i] = matrices[j]

        return how

    return on_nodes(kind, change)


def _with(order: list[int], *swaps: tuple[int, int]) -> list[int]:
    for a, b in swaps:
        order[a], order[b] = order[b], order[a]
    return order


def _dropped(kind: str, op_type: str, kept: int) -> Kind:
    """A node that only hands one of its inputs on."""

    def change(site: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        if node.op_type != op_type or node.domain or len(node.output) != 1:
            return None
        source = node.input[kept] if kept < len(node.input) else ""
        if not source or source in site.weights or source.startswith("const."):
            return None
        return lambda _, one: one.CopyFrom(helper.make_node("Identity", [source], list(one.output), name=one.name))

    return on_nodes(kind, change)


def _split_swapped(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
    if node.op_type != "Split" or len(node.output) != 2:
        return None

    def how(_: Damaged, one: onnx.NodeProto) -> None:
        one.output[0], one.output[1] = one.output[1], one.output[0]

    return how


def _position_off(by: int) -> Callable[[Site, onnx.NodeProto], Callable[[Damaged, onnx.NodeProto], None] | None]:
    def change(_: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        if "position" not in node.input or node.op_type == "Shape":
            return None

        def how(d: Damaged, one: onnx.NodeProto) -> None:
            graph = d.model.graph
            graph.initializer.append(numpy_helper.from_array(np.array([by]), "fault.by"))
            graph.node.insert(0, helper.make_node("Add", ["position", "fault.by"], ["fault.position"], name="fault"))
            for i, name in enumerate(one.input):
                one.input[i] = "fault.position" if name == "position" else name

        return how

    return change


def _reads(kind: str, before: str, step: int) -> Kind:
    """A node reads a value of another layer: of ``{before}.L`` that of L + step."""

    def change(site: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        for i, name in enumerate(node.input):
            words = name.split(".")
            if words[0] != before or len(words) < 2 or not words[1].lstrip("-").isdigit():
                continue
            words[1] = str(int(words[1]) + step)
            other = ".".join(words)
            if _shape(site, other) == _shape(site, name) != []:

                def how(_: Damaged, one: onnx.NodeProto, i: int = i, other: str = other) -> None:
                    one.input[i] = other

                return how
        return None

    return on_nodes(kind, change)


def _shape(site: Site, name: str) -> list[object]:
    graph = site.model.graph
    value = next((v for v in (*graph.input, *graph.value_info, *graph.output) if v.name == name), None)
    return [] if value is None else [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _constant(kind: str, factor: float) -> Kind:
    """A node reads a float constant that is so many times too large; others that share it do not."""

    def change(site: Site, node: onnx.NodeProto) -> Callable[[Damaged, onnx.NodeProto], None] | None:
        kept = {t.name: t for t in site.model.graph.initializer if t.name.startswith("const.float")}
        at = next((i for i, name in enumerate(node.input) if name in kept), None)
        if at is None or not numpy_helper.to_array(kept[node.input[at]]).astype(np.float64).any():
            return None

        def how(d: Damaged, one: onnx.NodeProto) -> None:
            array = numpy_helper.to_array(kept[one.input[at]])
            d.model.graph.initializer.append(numpy_helper.from_array((array * factor).astype(array.dtype), "fault"))
            one.input[at] = "fault"
            _forget_unread(d)

        return how

    return on_nodes(kind, change)


def _forget_unread(d: Damaged) -> None:
    read = {name for node in d.model.graph.node for name in node.input}
    kept = [t for t in d.model.graph.initializer if t.name in read]
    del d.model.graph.initializer[:]
    d.model.graph.initializer.extend(kept)


def _in_bodies(kind: str, pairs: dict[str, str]) -> Kind:
    """A node of an op's body is another one: every node that calls it is wrong."""

    def look(site: Site) -> Iterator[Fault]:
        for function in site.model.functions:
            callers = tuple(n.name for n in site.model.graph.node if n.op_type == function.name)
            for at, node in enumerate(function.node):
                if node.op_type in pairs and callers:

                    def plant(d: Damaged, name: str = function.name, at: int = at) -> None:
                        body = next(f for f in d.model.functions if f.name == name)
                        body.node[at].op_type = pairs[body.node[at].op_type]

                    yield Fault(kind, f"{node.op_type} of {function.name}", callers, plant)

    return look


def in_copy(kind: Kind) -> Kind:
    """The same fault in onnxruntime's copy alone: the portable graph is sound, and its lowering is wrong."""

    def look(site: Site) -> Iterator[Fault]:
        if site.lowered is None:
            return
        for fault in kind(Site.of(site.lowered)):

            def plant(d: Damaged, inner: Plant = fault.plant) -> None:
                d.lower()
                inner(d)

            yield Fault(f"{fault.kind}, in onnxruntime's copy", fault.place, fault.nodes, plant)

    return look


def _fewer(value: float) -> float:
    return value - 1 if value > 1 else value


def _ones(a: np.ndarray) -> np.ndarray:
    """Multipliers of 1, in float32 or as exponents."""
    return np.full_like(a, 0x3F800000 if a.dtype == np.uint32 else 127)


_OPERATORS = {"Add": "Sub", "Mul": "Add", "Sub": "Add", "Sin": "Cos", "Cos": "Sin", "Div": "Mul"}
_ACTIVATIONS = {"Sigmoid": "HardSigmoid", "Tanh": "Sigmoid", "Softplus": "Relu"}
_ORDERS = {"Less": "LessOrEqual", "LessOrEqual": "Less", "GreaterOrEqual": "Greater", "Greater": "GreaterOrEqual"}
_REDUCTIONS = {"ReduceMax": "ReduceMin", "ReduceSum": "ReduceMean", "ReduceMean": "ReduceSum", "Exp": "Softplus"}

#: Of custom ops: a kind of fault, an attribute, and what it becomes.
ATTRIBUTES: tuple[tuple[str, str, Callable[[float], float]], ...] = (
    ("scale 5% off", "scale", lambda v: v * 1.05),
    ("dropped scale", "scale", lambda v: 1.0),
    ("too few chosen", "top_k", _fewer),
    ("too few blocks kept", "top_blocks", _fewer),
    ("wrong group count", "num_groups", lambda v: v // 2 if v > 1 else v),
    ("wrong number of groups kept", "topk_groups", _fewer),
    ("weights not normed", "norm", lambda v: 1 - v),
    ("wrong ratio", "ratio", lambda v: v * 2),
    ("wrong limit of gates", "limit", lambda v: v / 100),
    ("too few iterations", "iterations", lambda v: v // 10),
    ("wrong epsilon of an op", "norm_eps", lambda v: max(v * 1e3, 1e-2)),
)

KINDS: tuple[Kind, ...] = (
    of_weights("transposed weight", _transposed, _matrix),
    of_weights("halves of a matrix's rows swapped", _halves(-2), _matrix),
    of_weights("halves of a matrix's columns swapped", _halves(-1), _matrix),
    of_weights("transposed weight of an expert", _transposed, _matrix, EXPERTS),
    of_weights("halves of an expert's rows swapped", _halves(-2), _matrix, EXPERTS),
    of_weights("rows off by one", lambda a: np.roll(a, 1, -2), _matrix),
    of_weights("negated weight", _negated, _matrix),
    of_weights("missing bias, sink or norm", np.zeros_like, _vector),
    of_weights("missing bias of a router", np.zeros_like, _vector, "e_score_correction_bias"),
    of_weights("halves of a vector swapped", _halves(-1), _vector),
    of_weights("vector off by one", lambda a: np.roll(a, 1, -1), _vector),
    of_weights("missing matrix of an expert", np.zeros_like, _matrix, EXPERTS),
    of_weights("dropped multipliers", _ones, lambda shape: True, "_scale_inv"),
    of_weights("multipliers off by one", lambda a: np.roll(a, 1, -1), _matrix, "_scale_inv"),
    _experts("two experts swapped", lambda E, n: _with(list(range(n)), *((p * E, p * E + 1) for p in range(3)))),
    _experts("experts one further", lambda E, n: [p * E + (e + 1) % E for p in range(3) for e in range(E)]),
    _experts("gate and up swapped", lambda E, n: [*range(E, 2 * E), *range(E), *range(2 * E, n)]),
    _experts("down of two experts swapped", lambda E, n: _with(list(range(n)), (2 * E + 1, 2 * E + 2))),
    _attribute("wrong epsilon", ("RMSNormalization", "LayerNormalization"), "epsilon", lambda v: max(v * 1e3, 1e-3)),
    _attribute("wrong rotary layout", ("RotaryEmbedding",), "interleaved", lambda v: 1 - v),
    *(_everywhere(_attribute(kind, (), name, value), kind) for kind, name, value in ATTRIBUTES),
    *(_attribute(f"{kind}, in one node", (), name, value) for kind, name, value in ATTRIBUTES),
    _swapped_inputs("cos and sin swapped", "RotaryEmbedding", 1, 2),
    _swapped_inputs("operands swapped", "Sub", 0, 1),
    _swapped_inputs("parts swapped", "Concat", 0, 1),
    on_nodes("halves of a split swapped", _split_swapped),
    on_nodes("position one too many", _position_off(1)),
    on_nodes("position one too few", _position_off(-1)),
    _dropped("lost term", "Add", 0),
    _dropped("lost residual", "Add", 1),
    _dropped("lost factor", "Mul", 0),
    _dropped("lost norm", "RMSNormalization", 0),
    _becomes("wrong operator", _OPERATORS),
    _becomes("wrong activation", _ACTIVATIONS),
    _reads("stale hidden states", "hidden", -1),
    _reads("stale state: another layer's rows", "state", 1),
    _reads("new rows of another layer", "new_state", -1),
    _constant("constant 1% off", 1.01),
    _in_bodies("wrong operator in a body", _OPERATORS | _ACTIVATIONS),
    _in_bodies("wrong order or sum in a body", _ORDERS | _REDUCTIONS),
    in_copy(_becomes("wrong operator", _OPERATORS | _ACTIVATIONS)),
    in_copy(_becomes("wrong order", _ORDERS | _REDUCTIONS)),
)


def faults(site: Site, most: int, seed: int) -> list[Fault]:
    """Of every kind one place, or of ``most`` kinds, by a seed."""
    rng = np.random.default_rng(seed)
    found = [places[rng.integers(len(places))] for places in (list(kind(site)) for kind in KINDS) if places]
    chosen = rng.permutation(len(found))[:most]
    return [found[i] for i in sorted(chosen)]
