"""Traces each kind of part once: embedding, a block of each kind, head.

A traced part is a graph whose inputs are the activations and every weight, so a trace holds no bytes of weights (they
are meta tensors) and its cost depends neither on the number of layers nor, since a routed block is traced with a single
expert, on the number of experts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.graphs.variants import formats, kinds, rounding
from v4export.model.block import (
    STATE,
    Block,
    BlockOutput,
    Embed,
    Head,
    block_reads,
    block_returns,
    embed_returns,
    head_reads,
    head_returns,
)
from v4export.model.draft import DraftEntry
from v4export.model.inputs import round_inputs
from v4export.model.linear import activations_of, hold
from v4export.model.reasoning import ThinkingHead
from v4export.model.rope import rotations
from v4export.model.shared_entries import HELD, NEW
from v4export.plugins import BY_NODE, OPS, STANDARD
from v4export.plugins.function_body import OPSET, PLUGIN_HINTS
from v4export.precision import Precision
from v4export.state_contract import StateTensor, may_skip_decoder, remembered, state_tensors

#: What the caller of the whole graph gives besides the state, with dynamic dimensions by the project's letters.
CALLER: dict[str, tuple[str, ...]] = {"input_ids": ("B", "S"), "position": ("B",), "logits_at": ("B", "Q")}

#: Of these, what the first part of a graph is given.
_ENTERS = ("input_ids", "position")

#: The same of a model that has a decoder: the first token of each sequence that has passed it.
DECODER_START = "decoder_start"

#: Name of the part that makes the entries of the decoder's first layer, for tokens that do not pass it.
ENTRIES = "entries"

#: Parts of a model that thinks: what its reasoning layers keep of a step's tokens; a whole thought; one step of one;
#: what a thought comes to.
ROWS, THINK, THINK_STEP, THINK_MIX = "reasoning", "think", "think_step", "think_mix"

#: Parts of a layer that drafts, and what it is given of each token besides the one that follows.
DRAFT_ENTRY, DRAFT_BLOCK, DRAFT_HEAD = "draft entry", "draft block", "draft head"
FEATURES = "features"

#: Sizes the tracer plugs in for each letter; T/n and S/n are rows that stand for n tokens. All differ and none is 0 or
#: 1, lest torch.export take two for the same or for a constant.
_SIZES = {"B": 2, "S": 1003, "M": 2006, "T": 5, "Q": 7, "K": 11, "N": 13, "P": 3}


@dataclass(frozen=True)
class Activation:
    """An input of a part that is no weight: a size or a letter for each dimension, and a dtype."""

    dims: tuple[int | str, ...]
    dtype: torch.dtype = torch.int64

    def example(self) -> torch.Tensor:
        """A tensor without bytes."""
        return torch.empty([_size(d) if isinstance(d, str) else d for d in self.dims], dtype=self.dtype, device="meta")

    def dynamic(self) -> dict[int, Any]:
        """Which dimensions vary, as torch.export wants it."""
        return {axis: torch.export.Dim.DYNAMIC for axis, d in enumerate(self.dims) if isinstance(d, str)}


def _size(letter: str) -> int:
    letter, _, every = letter.partition("/")
    if letter == "B*S":
        return _SIZES["B"] * -(-_SIZES["S"] // int(every))
    return _SIZES[letter] + 7 * int(every or 0)


@dataclass(frozen=True)
class Part:
    """One traced kind of part.

    Attributes:
        graph: inputs are those of ``reads`` followed by ``weights``.
        reads: the activation inputs by name.
        weights: names of the weight inputs, the module's parameter names.
        outputs: names of the outputs.
    """

    graph: ir.Graph
    reads: Mapping[str, Activation]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]


#: Calls a module with its activations by name.
Call = Callable[[Callable[..., Any], dict[str, torch.Tensor]], Any]


@dataclass(frozen=True)
class _Kind:
    """What is to be traced: a module, its activations, how it is called with them, and names of what it returns.

    Of a partial module most weights take no part.
    """

    module: nn.Module
    reads: dict[str, Activation]
    call: Call
    returns: tuple[str, ...]
    partial: bool = False


class _Functional(nn.Module):
    """A module whose weights are arguments."""

    def __init__(self, kind: _Kind, weights: Sequence[str]):
        super().__init__()
        self._run = functools.partial(torch.func.functional_call, kind.module)
        self._weights, self._kind = weights, kind

    def forward(self, *args: torch.Tensor) -> Any:
        count = len(self._kind.reads)
        named = dict(zip(self._kind.reads, args[:count], strict=True))
        weights = dict(zip(self._weights, args[count:], strict=True))
        return self._kind.call(lambda *a: self._run(weights, a), named)


def _in_order(run: Callable[..., Any], named: dict[str, torch.Tensor]) -> Any:
    return _flat(run(*named.values()))


def _flat(returned: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of what a module returns, however they are nested, in order."""
    if returned is None or isinstance(returned, torch.Tensor):
        return () if returned is None else (returned,)
    parts = returned.values() if isinstance(returned, Mapping) else returned
    return tuple(tensor for part in parts for tensor in _flat(part))


def _held_by(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(STATE): value for name, value in named.items() if name.startswith(STATE)}


def trace_parts(
    config: ModelConfig,
    precision: Precision,
    *,
    absorbed: bool = True,
    claim: Callable[[str], bool] = lambda _: True,
    last_first: bool = False,
) -> dict[str, Part]:
    """Trace what the model is made of: ``embed``, a block of each kind that occurs, ``head``.

    A model with a decoder also has the part ``entries``: what the decoder's first layer keeps of a token. One that
    thinks has the parts ``reasoning``, ``think``, ``think_step`` and ``think_mix``; one that drafts ``draft entry``,
    ``draft block`` and ``draft head``.

    Args:
        config: the model.
        precision: the recipe.
        absorbed: whether attention multiplies by latents.
        claim: asked for each part in its turn whether it is to be traced.
        last_first: whether the last part is the first.
    """
    parts = _kinds(config, precision, absorbed)
    with _quiet(), _operators_parsed_once():
        turns = reversed(parts) if last_first else iter(parts)
        return {name: _trace(parts[name]) for name in turns if claim(name)}


def part_names(config: ModelConfig, precision: Precision) -> list[str]:
    """Names of all parts, in their order."""
    return list(_kinds(config, precision, absorbed=True))


def _kinds(config: ModelConfig, precision: Precision, absorbed: bool) -> dict[str, _Kind]:
    dtype = activations_of(precision)

    def prepared(module: Any, layer: int | None = None) -> Any:
        """A part that holds its matrices, and rounds their inputs, as the recipe says."""
        return round_inputs(hold(module, formats(config, precision, layer)), rounding(config, precision, layer))

    def reads(layer: int, config: ModelConfig = config) -> dict[str, Activation]:
        names = ["hidden", *block_reads(config, layer)]
        held = {STATE + t.name: _held(t, dtype) for t in state_tensors(config, layer)}
        there = _activations(config, dtype) | _shared(config, layer, dtype)
        return {name: there[name] for name in names} | held

    def block(layer: int, config: ModelConfig = config, stored: int | None = None) -> _Kind:
        """That of a layer, whose weights are those of layer ``stored`` of the checkpoint; the same unless given."""
        returns = tuple(block_returns(config, layer))
        stored = layer if stored is None else stored

        def call(run: Callable[..., Any], named: dict[str, torch.Tensor]) -> Any:
            out: BlockOutput = run(named["hidden"], named, _held_by(named))
            return tuple(out.named()[name] for name in returns)

        part = prepared(Block(config, layer, dtype, absorbed, experts=1), stored)
        return _Kind(part, reads(layer, config), call, returns)

    def ends(embed: Embed, head: nn.Module, config: ModelConfig = config) -> tuple[_Kind, _Kind]:
        """Both ends of a stack."""
        there = _activations(config, dtype)
        given = [*_ENTERS, *([FEATURES] if isinstance(embed, DraftEntry) else [])]
        return (
            _Kind(embed, {name: there[name] for name in given}, _in_order, tuple(embed_returns(config))),
            _Kind(head, {name: there[name] for name in head_reads(config)}, _in_order, tuple(head_returns(config))),
        )

    def drafting(own: ModelConfig, stored: int) -> dict[str, _Kind]:
        """The parts of a layer that drafts."""
        entry, head = ends(prepared(DraftEntry(own, dtype), stored), prepared(Head(own, dtype), stored), own)
        return {DRAFT_ENTRY: entry, DRAFT_BLOCK: block(0, own, stored), DRAFT_HEAD: head}

    def entries(layer: int) -> _Kind:
        returns = tuple(t.name for t in remembered(config, layer))

        def call(run: Callable[..., Any], named: dict[str, torch.Tensor]) -> Any:
            out = run(named["hidden"], named, _held_by(named))
            return tuple(out[name] for name in returns)

        part = prepared(_Entries(config, layer, dtype, absorbed, experts=1), layer)
        return _Kind(part, reads(layer), call, returns, partial=True)

    with torch.device("meta"):
        embed, head = ends(Embed(config, dtype), prepared(Head(config, dtype)))
        return {
            "embed": embed,
            **{kind: block(layer) for kind, layer in kinds(config, precision).items()},
            **({ENTRIES: entries(_decoder(config))} if may_skip_decoder(config) else {}),
            "head": head,
            **(_thinking(config, dtype, _activations(config, dtype), absorbed, prepared) if config.thinks else {}),
            **(drafting(config.drafter, config.num_layers) if config.drafts else {}),
        }


def _thinking(
    config: ModelConfig,
    dtype: torch.dtype,
    known: Mapping[str, Activation],
    absorbed: bool,
    prepared: Callable[[nn.Module], nn.Module],
) -> dict[str, _Kind]:
    """The parts of a model that thinks, which are methods of its head."""
    assert config.reasoning is not None
    own_config, K = config.thinker, config.reasoning.steps
    layers = range(config.reasoning.layers)
    hidden = Activation(("B", "Q", config.hidden_size), dtype)
    at, entering = {"thought_at": Activation(("B", "Q"))}, {"entering": Activation(("B", "Q"))}
    latents = {f"{t.name}.{j}": _held(t, dtype) for j in layers for t in state_tensors(own_config, j)}
    own = {f"own.{j}": Activation(("P", "B", "Q", own_config.latent_dim), dtype) for j in layers}
    tokens = ["tokens"] if K > 2 else []
    kept = {name: known[name] for name in ("hidden", "position", *head_reads(config)[2:])}

    def kind(method: Callable[..., Any], reads: dict[str, Activation], returns: Sequence[str]) -> _Kind:
        part = type(method.__name__, (ThinkingHead,), {"forward": method})(config, dtype, absorbed)
        return _Kind(prepared(part), reads, _in_order, tuple(returns), partial=True)

    return {
        ROWS: kind(ThinkingHead.rows, kept, [*latents]),
        THINK_MIX: kind(ThinkingHead.mix, {"trunk": hidden, "thought": hidden}, ["logits", "weight"]),
        THINK_STEP: kind(
            ThinkingHead.step,
            {"thought": hidden} | entering | at | latents | own,
            ["thought", "token", *own, *(f"thought.{j}" for j in layers)],
        ),
        THINK: kind(
            ThinkingHead.think,
            {"trunk": hidden} | at | latents,
            ["logits", "weight", *tokens, *(f"thought.{k}.{j}" for k in range(1, K + 1) for j in layers)],
        ),
    }


class _Entries(Block):
    """A block that only makes entries; most of its weights take no part."""

    forward = Block.entries  # type: ignore[assignment]


def _decoder(config: ModelConfig) -> int:
    assert config.compressed and config.compressed.shared
    return config.compressed.shared.decoder


def _activations(config: ModelConfig, dtype: torch.dtype) -> dict[str, Activation]:
    """What parts read besides weights and state, by name."""
    known = {name: Activation(dims) for name, dims in CALLER.items()}
    known["hidden"] = Activation(("M", *config.hidden_shape), dtype)
    known[FEATURES] = Activation(("B", "S", *config.hidden_shape), dtype)
    known[DECODER_START] = Activation(("B",))
    if config.hyper:
        known["pre"] = Activation(("M", config.hyper.streams), torch.float32)
    if config.engram:
        e = config.engram
        known["engram"] = Activation(("B", "S", e.hashes)) if e.inside else Activation(("B", "S", e.row_dim), dtype)
    known |= {"selected": Activation(("M", "K")), "candidates": Activation(("M", "N"))}
    for name, rotation in rotations(config).items():
        rows = "M" if rotation.every == 1 else f"B*S/{rotation.every}"
        turn = Activation((1, rows, config.qk_rope_head_dim // 2), torch.float32)
        known |= {f"cos.{name}": turn, f"sin.{name}": turn}
    return known


def _shared(config: ModelConfig, layer: int, dtype: torch.dtype) -> dict[str, Activation]:
    """The entries and index keys that a layer reads of the one before it that made them."""
    c = config.compressed
    if c is None or c.shared is None:
        return {}
    source = max((i for i in c.shared.kv_sources if i <= layer), default=None)
    made = [t for t in state_tensors(config, source) if t.every == c.ratios[source]] if source is not None else []
    made = [t for t in made if t.ring is None]
    return {HELD + t.name: _held(t, dtype) for t in made} | {
        NEW + t.name: Activation(("B", t.returned_dim, t.width), _dtype(t, dtype)) for t in made
    }


def _held(tensor: StateTensor, dtype: torch.dtype) -> Activation:
    return Activation(("B", tensor.held_dim, tensor.width), _dtype(tensor, dtype))


def _dtype(tensor: StateTensor, activations: torch.dtype) -> torch.dtype:
    return getattr(torch, tensor.dtype) if tensor.dtype else activations


def _trace(kind: _Kind) -> Part:
    _register_schemas()
    names = tuple(name for name, _ in kind.module.named_parameters())
    read = kind.reads.values()
    program = torch.onnx.export(
        _Functional(kind, names).eval(),
        (*(a.example() for a in read), *kind.module.parameters()),
        dynamo=True,
        opset_version=OPSET,
        input_names=[*kind.reads, *(f"weight:{name}" for name in names)],
        dynamic_shapes=((*(a.dynamic() for a in read), *([None] * len(names))),),
        custom_translation_table={
            **{op.torch_op._opoverload: op.translate for op in OPS},
            **{op._opoverload: translate for op, translate in STANDARD.items()},
        },
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    graph = program.model.graph
    _complete_types(graph)
    weights = graph.inputs[len(kind.reads) :]
    for value in [value for value in weights if kind.partial and not value.uses()]:
        graph.inputs.remove(value)
    used = {value.name for value in graph.inputs}
    return Part(graph, kind.reads, tuple(n for n in names if f"weight:{n}" in used), kind.returns)


def _complete_types(graph: ir.Graph) -> None:
    """The exporter does not know what custom nodes return."""
    for node in graph:
        op = BY_NODE.get((node.domain, node.op_type))
        if op:
            for output, dtype in zip(node.outputs, op.outputs, strict=True):
                output.dtype = dtype(node)


@functools.cache
def _register_schemas() -> None:
    """onnxscript writes a node only for an op it has a schema of: any number of inputs of any type."""
    schema = onnx.defs.OpSchema
    for op in OPS:
        hints = dict.fromkeys(PLUGIN_HINTS, "STRING")
        attributes = [
            schema.Attribute(name, getattr(schema.AttrType, kind), "", required=False)
            for name, kind in {**op.attributes, **hints}.items()
        ]
        variadic = schema.FormalParameter(
            "inputs", "T", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False
        )
        onnx.defs.register_schema(
            schema(
                op.op_type,
                op.domain,
                1,
                inputs=[variadic],
                outputs=[schema.FormalParameter(f"out{i}", "T") for i in range(len(op.outputs))],
                type_constraints=[("T", _TYPES, "")],
                attributes=attributes,
            )
        )


_TYPES = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "float8e4m3fn", "int8", "uint8", "int64", "bool")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its own progress and absent optional packages; neither is news to the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@functools.cache
def _parsed(parse: Callable[[int], Any], opset_version: int) -> Any:
    return parse(opset_version)


@contextlib.contextmanager
def _operators_parsed_once() -> Iterator[None]:
    """The exporter parses the source of each of its operators at every call, a third of a small part's time.

    How it keeps them is its own affair: where that has changed, they are parsed as often as before.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        parsed, kept = ONNXRegistry.from_torchlib, vars(ONNXRegistry)["from_torchlib"]
        kept_by_instances = {"_opset_version", "functions"} == vars(ONNXRegistry()).keys()
    except (ImportError, AttributeError, KeyError):
        kept_by_instances = False
    if not kept_by_instances:
        yield
        return

    def copied(opset_version: int) -> Any:
        registry, found = ONNXRegistry(), _parsed(parsed, opset_version)
        registry._opset_version = opset_version
        registry.functions = {name: list(overloads) for name, overloads in found.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = kept
