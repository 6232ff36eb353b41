"""Stamps the traced parts out over all layers: the portable ``model.onnx``.

One node for each custom op of each layer, weights as references into files, and a model-local function for each op.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from v4export.checkpoint.pieces import Share
from v4export.config import ModelConfig
from v4export.graphs.shards import Placed, numpy_dtype
from v4export.graphs.trace import (
    CALLER,
    DECODER_START,
    DRAFT_BLOCK,
    DRAFT_ENTRY,
    DRAFT_HEAD,
    ENTRIES,
    FEATURES,
    ROWS,
    Part,
)
from v4export.graphs.variants import kind_of
from v4export.model.block import STATE, block_shares
from v4export.model.load import hub_name
from v4export.plugins import BY_NODE
from v4export.plugins.function_body import OPSET, VERSION
from v4export.precision import Precision
from v4export.state_contract import StateTensor, remembered, state_tensors

IR_VERSION = 10

#: Within a block, where each expert is among those that a rank holds.
PLACES = "mlp.places"


def state_name(layer: int, tensor: str) -> str:
    """Name of a layer's state tensor among the graph's inputs."""
    return f"state.{layer}.{tensor}"


def new_state_name(layer: int, tensor: str) -> str:
    """Name of its new rows among the graph's outputs."""
    return f"new_state.{layer}.{tensor}"


def hidden_name(layer: int) -> str:
    """Name of the hidden states [M, D], or [M, X, D], that leave a layer; -1 is the embedding."""
    return f"hidden.{layer}"


def experts_name(layer: int) -> str:
    """Name of the expert indices [M, K] that a layer's router chose."""
    return f"experts.{layer}"


def selected_name(layer: int) -> str:
    """Name of the numbers [M, K] of tokens or entries that a layer's indexer selected, -1 for none."""
    return f"selected.{layer}"


def candidates_name(layer: int) -> str:
    """Name of the numbers [M, K] of blocks of entries that a layer kept for later ones, -1 for none."""
    return f"candidates.{layer}"


def shares_name(layer: int) -> str:
    """Name of the shares [M, X] of the streams in the next layer's input; -1 is the embedding's."""
    return f"pre.{layer}"


def engram_name(layer: int) -> str:
    """Name of what was looked up for a layer, among the graph's inputs."""
    return f"engram.{layer}"


def stamp(
    config: ModelConfig,
    precision: Precision,
    parts: Mapping[str, Part],
    weights: Mapping[str, Placed],
    base: Path,
    share: Share | None = None,
) -> ir.Model:
    """The whole graph.

    Args:
        config: the model, or the sizes of it that one rank computes.
        precision: dtype of the state.
        parts: from ``trace_parts``.
        weights: where each weight lies, by Hub name.
        base: folder that the weights' locations are relative to.
        share: of a model shared among ranks, what this one holds.
    """
    return _Stamper(config, precision, parts, weights, base, share).whole()


def stamp_remembering(
    config: ModelConfig, precision: Precision, parts: Mapping[str, Part], weights: Mapping[str, Placed], base: Path
) -> ir.Model:
    """The graph of tokens that do not pass the decoder: new rows of all layers before it, and its entries.

    Args as for ``stamp``.
    """
    return _Stamper(config, precision, parts, weights, base).remembering()


def stamp_thinking(
    config: ModelConfig,
    precision: Precision,
    parts: Mapping[str, Part],
    weights: Mapping[str, Placed],
    base: Path,
    *,
    part: str,
) -> ir.Model:
    """The graph of a thought, of one step of one, or of what one comes to, by the name of its ``part``.

    Other args as for ``stamp``.
    """
    return _Stamper(config, precision, parts, weights, base).thinking(part)


def stamp_drafting(
    config: ModelConfig, precision: Precision, parts: Mapping[str, Part], weights: Mapping[str, Placed], base: Path
) -> ir.Model:
    """The graph of a layer that drafts; args as for ``stamp``."""
    return _Stamper(config, precision, parts, weights, base).drafting()


#: How the graph's values are called that leave a block, state apart.
_NAMES = {
    "hidden": hidden_name,
    "experts": experts_name,
    "selected": selected_name,
    "candidates": candidates_name,
    "pre": shares_name,
}


class _Stamper:
    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        parts: Mapping[str, Part],
        weights: Mapping[str, Placed],
        base: Path,
        share: Share | None = None,
    ) -> None:
        self.share = share
        self.config, self.precision, self.parts, self.weights, self.base = config, precision, parts, weights, base
        self.activations = ir.DataType.from_numpy(numpy_dtype(precision.activations))
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.new_state: list[ir.Value] = []

    def whole(self) -> ir.Model:
        c = self.config
        known = self._begin(list(CALLER))
        if any(map(c.is_decoder, range(c.num_layers))):
            known[DECODER_START] = self._input(DECODER_START, CALLER["position"], ir.DataType.INT64)
        for layer in range(c.num_layers):
            self._layer(layer, kind_of(c, self.precision, layer), known, state_tensors(c, layer))
        said = self._head(self.parts["head"], None, known)
        if c.thinks:
            self._reasoning_rows(known)
        return self._model(said)

    def drafting(self) -> ir.Model:
        """The layer that drafts, numbered behind the model's own, between ends of its own."""
        layer = self.config.num_layers
        known = self._begin([*CALLER, FEATURES], DRAFT_ENTRY, layer)
        self._layer(layer, DRAFT_BLOCK, known, state_tensors(self.config, layer))
        return self._model(self._head(self.parts[DRAFT_HEAD], layer, known))

    def _head(self, part: Part, layer: int | None, known: Mapping[str, ir.Value]) -> list[ir.Value]:
        """What it says. Of what the graph is also given it is called ``new_`` that."""
        said, given = self._place(part, "head.", layer, known), {value.name for value in self.inputs}
        for name, value in said.items():
            value.name, value.shape = f"new_{name}" if name in given else name, ir.Shape(self._shapes()[name])
        return [*said.values()]

    def _reasoning_rows(self, known: Mapping[str, ir.Value]) -> None:
        """What reasoning layers keep of the step's tokens."""
        rows = self._place(self.parts[ROWS], f"{ROWS}.", None, known)
        layers = range(self.config.num_layers, self.config.state_layers)
        tensors = [(layer, tensor) for layer in layers for tensor in state_tensors(self.config, layer)]
        for (layer, tensor), value in zip(tensors, rows.values(), strict=True):
            value.name = new_state_name(layer, tensor.name)
            self._returns(tensor, value)

    def thinking(self, name: str) -> ir.Model:
        """One of the graphs of thoughts: a part by itself. What it returns of an input is called ``new_`` that."""
        part, c = self.parts[name], self.config
        kept = [(i, t.name) for i in range(c.num_layers, c.state_layers) for t in state_tensors(c, i)]
        state = {f"{tensor}.{layer - c.num_layers}": state_name(layer, tensor) for layer, tensor in kept}
        read = {
            one: self._input(state.get(one, one), activation.dims, from_torch_dtype(activation.dtype))
            for one, activation in part.reads.items()
        }
        out, shapes = self._place(part, f"{name}.", None, read), self._shapes()
        outputs = [value for one, value in out.items() if one in shapes]
        for one, value in out.items():
            value.name = f"new_{one}" if one in read else one
            value.shape = ir.Shape(shapes[one]) if one in shapes else value.shape
        return self._model(outputs)

    def _shapes(self) -> dict[str, tuple[int | str, ...]]:
        """What graphs return besides new rows of the state, by name."""
        c, each = self.config, ("B", "Q")
        shapes: dict[str, tuple[int | str, ...]] = {
            "logits": (*each, c.vocab_size),
            FEATURES: ("B", "S", *c.hidden_shape),
        }
        if c.reasoning is None:
            return shapes
        shapes |= dict.fromkeys(("trunk", "thought"), (*each, c.hidden_size)) | dict.fromkeys(("weight", "token"), each)
        own = {f"own.{j}": ("P+1", *each, c.thinker.latent_dim) for j in range(c.reasoning.layers)}
        return shapes | {"tokens": (*each, c.reasoning.steps - 2)} | own

    def remembering(self) -> ir.Model:
        c = self.config
        assert c.compressed and c.compressed.shared
        decoder = c.compressed.shared.decoder
        known = self._begin(["input_ids", "position"])
        for layer in range(decoder):
            self._layer(layer, kind_of(c, self.precision, layer), known, state_tensors(c, layer))
        self._layer(decoder, ENTRIES, known, remembered(c, decoder))
        # Entries that are only added to are not read.
        self.inputs = [value for value in self.inputs if value.uses()]
        return self._model([])

    def _begin(self, caller: Sequence[str], part: str = "embed", layer: int | None = None) -> dict[str, ir.Value]:
        """What layers read, all of them or the one that drafts: inputs, and what the embedding makes of them."""
        inputs = dict.fromkeys(CALLER, ir.DataType.INT64) | {FEATURES: self.activations}
        dims = CALLER | {FEATURES: self._shapes()[FEATURES]}
        known = {name: self._input(name, dims[name], inputs[name]) for name in caller}
        made = self._place(self.parts[part], "embed.", layer, known)
        for name in made.keys() & _NAMES.keys():
            made[name].name = _NAMES[name]((layer or 0) - 1)
        return known | made

    def _layer(self, layer: int, kind: str, known: dict[str, ir.Value], tensors: Sequence[StateTensor]) -> None:
        """One layer; ``known`` gains what it shares with those after it."""
        part, dtype = self.parts[kind], self.activations
        held = {
            STATE + t.name: self._input(
                state_name(layer, t.name),
                ("B", t.held_dim, t.width),
                ir.DataType.from_numpy(numpy_dtype(t.dtype)) if t.dtype else dtype,
            )
            for t in tensors
        }
        engram = self.config.engram
        if engram and self.config.has_engram(layer):
            width, kind_of = (engram.hashes, ir.DataType.INT64) if engram.inside else (engram.row_dim, dtype)
            known["engram"] = self._input(engram_name(layer), ("B", "S", width), kind_of)
        out = self._place(part, f"layers.{layer}.", layer, known | held)
        by_name = {t.name: t for t in tensors}
        streams = self.config.hyper.streams if self.config.hyper else 0
        dims: dict[str, tuple[int | str, ...]] = {"hidden": ("M", *self.config.hidden_shape), "pre": ("M", streams)}
        dims |= {"selected": ("M", "K"), "candidates": ("M", "N")}
        for name, value in out.items():
            value.name = _NAMES.get(name, functools.partial(new_state_name, tensor=name))(layer)
            if name in dims:
                # A later stage may have it as an input, whose dimensions have to have names.
                value.shape = ir.Shape(dims[name])
            if name in by_name:
                self._returns(by_name[name], value)
        shares = block_shares(self.config, layer) if kind != ENTRIES else {}
        known |= {name: (out | held)[own] for name, own in shares.items()}

    def _returns(self, tensor: StateTensor, rows: ir.Value) -> None:
        """New rows of a state tensor are an output."""
        rows.shape = ir.Shape(["B", tensor.returned_dim, tensor.width])
        self.new_state.append(rows)

    def _model(self, outputs: Sequence[ir.Value]) -> ir.Model:
        _tell_apart(self.nodes)
        functions = portable_bodies(self.nodes)
        graph = ir.Graph(
            self.inputs,
            [*outputs, *self.new_state],
            nodes=self.nodes,
            initializers=self.initializers.values(),
            opset_imports={"": OPSET, **dict.fromkeys(sorted({f.domain for f in functions}), VERSION)},
            name="v4export",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="v4export", functions=functions)

    def _input(self, name: str, dims: Sequence[int | str], dtype: ir.DataType) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def _place(
        self, part: Part, prefix: str, layer: int | None, activations: Mapping[str, ir.Value]
    ) -> dict[str, ir.Value]:
        """Copy a part's nodes into the graph; the copies of its outputs, by name."""
        values: dict[ir.Value | None, list[ir.Value | None]] = {None: [None]}
        values |= {
            formal: [activations[name]]
            for name, formal in zip(part.reads, part.graph.inputs, strict=False)
            if formal.uses()
        }
        for formal, name in zip(part.graph.inputs[len(part.reads) :], part.weights, strict=True):
            values[formal] = list(self._weights_of(name, layer))
        for initializer in part.graph.initializers.values():
            assert initializer.const_value is not None
            values[initializer] = [self._constant(initializer.const_value.numpy())]
        for node in part.graph:
            self.nodes.append(self._copy(node, values, prefix, layer))
        outputs = (values[output][0] for output in part.graph.outputs)
        return {name: value for name, value in zip(part.outputs, outputs, strict=True) if value is not None}

    def _copy(
        self, node: ir.Node, values: dict[ir.Value | None, list[ir.Value | None]], prefix: str, layer: int | None
    ) -> ir.Node:
        outputs = [ir.Value(name=f"{prefix}{o.name}", type=o.type, shape=_readable(o.shape)) for o in node.outputs]
        attributes = dict(node.attributes)
        if node.op_type == "MoeExperts":
            attributes["num_experts"] = ir.AttrInt64("num_experts", len(self._experts(layer)))
        copy = ir.Node(
            node.domain,
            node.op_type,
            [actual for formal in node.inputs for actual in values[formal]],
            attributes.values(),
            outputs=outputs,
            name=f"{prefix}{node.name}",
        )
        values.update({old: [new] for old, new in zip(node.outputs, copy.outputs, strict=True)})
        return copy

    def _experts(self, layer: int | None) -> Sequence[int]:
        """Numbers of the experts of a layer that the graph holds."""
        assert layer is not None
        return self.share.experts(layer) if self.share else range(self.config.num_experts)

    def _weights_of(self, name: str, layer: int | None) -> list[ir.Value]:
        """The initialisers a part's weight input stands for: one, or one per expert."""
        if name == PLACES:
            places = np.full(self.config.num_experts, -1)
            places[list(self._experts(layer))] = np.arange(len(self._experts(layer)))
            return [self._constant(places)]
        if ".experts.0." in name:
            stand_ins = [name.replace(".experts.0.", f".experts.{e}.") for e in self._experts(layer)]
            return [self._initializer(f"model.layers.{layer}.{n}", stacked=True) for n in stand_ins]
        stored = hub_name(name, self.config, layer)
        if stored is None:
            return [self._embedded("no_correction_bias", np.zeros(self.config.num_experts, np.float32))]
        return [self._initializer(stored)]

    def _initializer(self, stored: str, stacked: bool = False) -> ir.Value:
        """A reference into a file. ``stacked`` gives a leading 1, so that experts concatenate into a stack."""
        if stored not in self.initializers:
            placed = self.weights[stored]
            tensor = ir.ExternalTensor(
                placed.location,
                placed.offset,
                placed.nbytes,
                ir.DataType.from_numpy(numpy_dtype(placed.dtype)),
                shape=ir.Shape((1, *placed.shape) if stacked else placed.shape),
                name=stored,
                base_dir=self.base,
            )
            self._keep(stored, tensor)
        return self.initializers[stored]

    def _constant(self, array: np.ndarray) -> ir.Value:
        """A small constant, shared by all parts that have an equal one."""
        return self._embedded(f"const.{array.dtype}.{'x'.join(map(str, array.shape))}.{_digest(array)}", array)

    def _embedded(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.initializers:
            self._keep(name, ir.tensor(array, name=name))
        return self.initializers[name]

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> None:
        self.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )


def _tell_apart(nodes: Sequence[ir.Node]) -> None:
    """Experts of several formats, which an exception to a recipe makes, have a body for each."""
    experts = [node for node in nodes if node.op_type == "MoeExperts"]
    stored = [node.attributes["format"].as_string() for node in experts]
    for node, format in zip(experts, stored, strict=True):
        node.overload = format if format != stored[0] else ""


def portable_bodies(nodes: Sequence[ir.Node]) -> list[ir.Function]:
    """The functions that define the custom nodes, innermost first."""
    functions: dict[tuple[str, str, str], ir.Function] = {}

    def define(some: Iterable[ir.Node]) -> None:
        for node in some:
            op = BY_NODE.get((node.domain, node.op_type))
            if op and op.function and (node.domain, node.op_type, node.overload) not in functions:
                body = op.function(node)
                body.overload = node.overload
                functions[node.domain, node.op_type, node.overload] = body

    define(nodes)
    for function in list(functions.values()):
        define(function)
    return sorted(functions.values(), key=lambda f: f.domain)


def _readable(shape: ir.Shape | None) -> ir.Shape | None:
    """Known sizes stay; the tracer's symbols mean nothing outside one part."""
    return None if shape is None else ir.Shape([d if isinstance(d, int) else None for d in shape])


def _digest(array: np.ndarray) -> str:
    """A name's tail that equal constants share; the same in every process, so that builds can be compared."""
    return (
        "_".join(map(str, array.ravel().tolist()))
        if array.size <= 8
        else hashlib.sha1(array.tobytes()).hexdigest()[:12]
    )
