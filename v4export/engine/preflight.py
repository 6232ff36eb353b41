"""What TensorRT would refuse, or build wrongly without a word, found in an ONNX file before the build.

Each rule was seen in a build; the table ``RULES`` is the list. Weights are not read. Nodes are looked for everywhere:
in the graph, in If and Loop bodies, and in the bodies of model-local functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from v4export.engine.bodies import large_tensors
from v4export.plugins.limits import MAX_ELEMENTS, MAX_TOPK

#: Operators the parsers know by name in any domain, beside the standard ones: a function of such a name is not used.
# fmt: off
BUILTIN_NAMES = frozenset((
    "TRT_MoE", "TRT_KVCacheUpdate", "TRT_Attention", "TRT_BlockQuantize", "TRT_BlockDequantize",
    "TRT_DynamicQuantize", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8QuantizeLinear",
    "TRT_MXFP8DequantizeLinear", "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4QuantizeLinear",
    "TRT_INT4DequantizeLinear", "DistCollective", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
    "MultiHeadAttention", "GroupQueryAttention", "MatMulNBits", "QMoE", "LinearAttention", "CausalConvWithState",
))
# fmt: on
#: Functions that mirror a builtin on purpose: their body computes what the builtin does.
MIRRORED = frozenset({("trt", "TRT_BlockDequantize"), ("trt", "TRT_INT4DequantizeLinear")})
UNSUPPORTED = {
    "NonZero": "give every position a fixed place (Where, TopK, a mask) instead",
    "Unique": "sort with TopK, or do it outside the graph",
    "Compress": "use Gather with a fixed number of indices, or a mask",
    "Multinomial": "sample outside the graph",
    "BitwiseAnd": "use Mod and Div",
    "BitwiseOr": "use Mod and Div",
    "BitwiseXor": "use Mod and Div",
    "BitwiseNot": "use Mod and Div",
    "BitShift": "use Mul and Div",
    "DynamicQuantizeLinear": "compute the scale, then QuantizeLinear",
    "CumProd": "use Exp(CumSum(Log))",
    "SequenceAt": "use tensors with a leading axis",
    "SequenceConstruct": "use tensors with a leading axis",
    "SequenceInsert": "use tensors with a leading axis",
    "SplitToSequence": "use Split",
    "SequenceLength": "use tensors with a leading axis",
}
#: (rule, operator) that standard TensorRT does have.
RTX_ONLY = frozenset({("unsupported-op", "NonZero"), ("scatter-reduction", "ScatterElements")})
SCATTERS = ("ScatterElements", "ScatterND")
QUANTIZED = frozenset({onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.INT4})
UNREADABLE = {
    onnx.TensorProto.FLOAT8E5M2: "float8e5m2",
    onnx.TensorProto.FLOAT8E8M0: "float8e8m0",
    onnx.TensorProto.UINT4: "uint4",
}
BRANCHES = ("If",)
NESTED = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class Problem:
    """One thing found.

    Attributes:
        severity: ``error``: the build fails or the engine is wrong; ``warning``: it may.
        rule: short name of the rule.
        where: graph, subgraph or function, and the node in it.
        message: what is so, with its values.
        fix: what to do.
    """

    severity: str
    rule: str
    where: str
    message: str
    fix: str


@dataclass(frozen=True)
class Place:
    """A node, where it stands, the constants it can see, and the operators around it, outermost first.

    ``made`` has the nodes beside it by what they return.
    """

    node: onnx.NodeProto
    path: str
    constants: dict[str, onnx.TensorProto]
    around: tuple[str, ...] = ()
    made: dict[str, onnx.NodeProto] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Where the node stands, for a message."""
        return f"{self.path}/{self.node.name or self.node.op_type}"

    def attribute(self, name: str) -> onnx.AttributeProto | None:
        """One of the node's attributes."""
        return next((a for a in self.node.attribute if a.name == name), None)

    def given(self, index: int) -> bool:
        """Whether an optional input is given."""
        return len(self.node.input) > index and bool(self.node.input[index])


Rule = Callable[[Place], Iterator[tuple[str, str, str, str]]]


def preflight(model: onnx.ModelProto | Path, backend: str = "tensorrt_rtx") -> list[Problem]:
    """Every problem of an ONNX model, in the order of its nodes; external data is not opened."""
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    found = [problem for place in places(proto) for problem in _check(place, backend)]
    return [*_functions(proto), *_constants(proto), *_loops(proto), *_initialisers(proto), *_inside(proto), *found]


def places(model: onnx.ModelProto) -> Iterator[Place]:
    """Every node of a model, those of subgraphs and of local functions included."""
    yield from _graph(model.graph, "graph", {}, ())
    for function in model.functions:
        yield from _nodes(function.node, f"{function.domain}::{function.name}", {}, ())


def _graph(
    graph: onnx.GraphProto, path: str, outer: dict[str, onnx.TensorProto], around: tuple[str, ...]
) -> Iterator[Place]:
    own = {tensor.name: tensor for tensor in graph.initializer}
    yield from _nodes(graph.node, path, outer | own, around)


def _nodes(
    nodes: list[onnx.NodeProto], path: str, outer: dict[str, onnx.TensorProto], around: tuple[str, ...]
) -> Iterator[Place]:
    constants = outer | {node.output[0]: value for node in nodes if (value := _constant(node)) is not None}
    made = {name: node for node in nodes for name in node.output}
    for node in nodes:
        place = Place(node, path, constants, around, made)
        yield place
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for graph in graphs:
                yield from _graph(graph, f"{place.name}/{attribute.name}", constants, (*around, node.op_type))


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; its numeric attribute forms are put in the form of a tensor."""
    if node.op_type != "Constant" or not node.attribute or node.attribute[0].ref_attr_name:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        return attribute.t
    if attribute.name in ("value_int", "value_ints"):
        values = attribute.i if attribute.name == "value_int" else list(attribute.ints)
        return numpy_helper.from_array(np.array(values, np.int64))
    return None


def _check(place: Place, backend: str) -> Iterator[Problem]:
    op = place.node.op_type
    for rule in RULES.get(op, ()) if place.node.domain in ("", "ai.onnx") else ():
        for severity, name, message, fix in rule(place):
            if backend == "tensorrt" and (name, op) in RTX_ONLY:
                continue
            yield Problem(severity, name, place.name, message, fix)


def _unsupported(place: Place) -> Iterator[tuple[str, str, str, str]]:
    op = place.node.op_type
    yield "error", "unsupported-op", f"{op} has no implementation in TensorRT", UNSUPPORTED[op]


def _topk(place: Place) -> Iterator[tuple[str, str, str, str]]:
    if not all(place.node.output) or len(place.node.output) < 2:
        yield "error", "unnamed-output", "TopK has an output without a name", "name both outputs"
    k = _most(place, place.node.input[1])
    if k is not None and k > MAX_TOPK:
        yield "error", "topk-limit", f"k is {k}, the limit {MAX_TOPK}", "select in groups, then among winners"


def _most(place: Place, name: str) -> int | None:
    """The largest value that a tensor of one number can have: a constant's, or the least of several if one is constant.

    Selecting from a cache asks for "k, or all there are", so that k may well be reached.
    """
    constant = place.constants.get(name)
    if constant is not None and constant.data_location != onnx.TensorProto.EXTERNAL:
        return int(numpy_helper.to_array(constant).reshape(-1)[0])
    maker = place.made.get(name)
    if maker is None or maker.op_type not in ("Min", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"):
        return None
    operands = maker.input if maker.op_type == "Min" else maker.input[:1]
    known = [value for operand in operands if (value := _most(place, operand)) is not None]
    return min(known) if known else None


def _scatter(place: Place) -> Iterator[tuple[str, str, str, str]]:
    reduction = place.attribute("reduction")
    if reduction is not None and reduction.s not in (b"", b"none"):
        message = f"reduction is {reduction.s.decode()}; only none is read"
        yield "error", "scatter-reduction", message, "sum with MatMul or ReduceSum over a one-hot axis"


def _attention(place: Place) -> Iterator[tuple[str, str, str, str]]:
    if place.given(6):
        message = "nonpad_kv_seqlen is dropped without an error"
        yield "error", "attention-dropped-input", message, "give an explicit mask"
    if place.given(4) or place.given(5) or len([name for name in place.node.output if name]) > 1:
        message = "past and present keys and values are not read"
        yield "error", "attention-cache", message, "concatenate the cache outside the operator"
    softcap = place.attribute("softcap")
    if softcap is not None and softcap.f:
        yield "error", "attention-softcap", f"softcap is {softcap.f:g}", "write the attention out, with Tanh"


def _nesting(place: Place) -> Iterator[tuple[str, str, str, str]]:
    if any(op in BRANCHES for op in place.around):
        message = f"{place.node.op_type} inside {' inside '.join(reversed(place.around))}"
        fix = "put it beside the If: a Loop of zero trips, or a branch that passes its value on"
        yield "error", "control-flow-in-if", message, fix


def _loop(place: Place) -> Iterator[tuple[str, str, str, str]]:
    if not place.given(1):
        message = "the Loop has no condition input, so that its body's condition is not registered"
        yield "error", "loop-without-condition", message, "give it a Constant true"


def _quantized(place: Place) -> Iterator[tuple[str, str, str, str]]:
    for name in place.node.input:
        tensor = place.constants.get(name)
        if tensor is not None and tensor.data_type in QUANTIZED:
            message = f"{place.node.op_type} takes the quantised weight {name}"
            yield "error", "quantized-before-dequantize", message, "dequantise first, then apply it"


RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(UNSUPPORTED, (_unsupported,)),
    **dict.fromkeys(SCATTERS, (_scatter,)),
    **dict.fromkeys(NESTED, (_nesting,)),
    **dict.fromkeys(("Cast", "Gather", "Concat", "MatMul"), (_quantized,)),
    "Loop": (_nesting, _loop),
    "TopK": (_topk,),
    "Attention": (_attention,),
}


def _functions(model: onnx.ModelProto) -> Iterator[Problem]:
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    for function in model.functions:
        builtin = function.name in BUILTIN_NAMES or function.name in standard
        if builtin and (function.domain, function.name) not in MIRRORED:
            yield Problem(
                "error",
                "builtin-name",
                f"{function.domain}::{function.name}",
                "the parser knows this name, whatever the domain, and would not use the function's body",
                "give the function another name",
            )


def _constants(model: onnx.ModelProto) -> Iterator[Problem]:
    """A graph's Constant behind a call takes the value of a Constant of the same name inside the function called."""
    functions = {(f.domain, f.name): f for f in model.functions}

    @functools.cache
    def inside(function: tuple[str, str]) -> frozenset[str]:
        nodes = functions[function].node if function in functions else ()
        called = (inside((node.domain, node.op_type)) for node in nodes)
        return frozenset(node.output[0] for node in nodes if node.op_type == "Constant").union(*called)

    met: dict[str, str] = {}
    for node in model.graph.node:
        met |= dict.fromkeys(inside((node.domain, node.op_type)), node.op_type)
        if node.op_type == "Constant" and node.output[0] in met:
            name = node.output[0]
            message = f"{name} would get the value of the {name} inside {met[name]}, which is called before it"
            yield Problem("error", "constant-name", f"graph/{node.name or name}", message, "give it a name of its own")


def _loops(model: onnx.ModelProto) -> Iterator[Problem]:
    """Shapes that pass through one Loop after another are not resolved: "dependency chain exceeds 6 levels"."""
    inside = {(f.domain, f.name): sum(node.op_type == "Loop" for node in f.node) for f in model.functions}
    count = sum(inside.get((node.domain, node.op_type), node.op_type == "Loop") for node in model.graph.node)
    if count > 1:
        message = f"{count} Loops one after another, whose shapes may be nested too deeply"
        yield Problem("warning", "several-loops", "graph", message, "use a form without loops, such as Gather")


def _initialisers(model: onnx.ModelProto) -> Iterator[Problem]:
    for tensor in model.graph.initializer:
        count = int(np.prod(tensor.dims, dtype=np.int64))
        if count > MAX_ELEMENTS:
            message = f"{count} elements, more than {MAX_ELEMENTS}"
            yield Problem("warning", "large-initialiser", tensor.name, message, "split it along an axis")
        if tensor.data_type in UNREADABLE:
            message = f"{UNREADABLE[tensor.data_type]} initialisers are not read"
            yield Problem("error", "unreadable-type", tensor.name, message, "store it as uint8 or as a wider type")


def _inside(model: onnx.ModelProto) -> Iterator[Problem]:
    for where, name, shape in large_tensors(model):
        message = f"{name} {shape} has {math.prod(shape)} elements, more than {MAX_ELEMENTS}"
        yield Problem("error", "large-tensor", where, message, "write the body so that it makes it in parts")
