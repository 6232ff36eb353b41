"""What a runtime would refuse, or silently get wrong, proved absent on every export."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from v4export.checkpoint.names import SCALE
from v4export.config import ModelConfig
from v4export.errors import NotSupported
from v4export.graphs.read_back import check_formats
from v4export.graphs.roundings import check_roundings
from v4export.graphs.trace import Part
from v4export.graphs.variants import kind_of
from v4export.graphs.weights import SCALE_2
from v4export.plugins import BY_NODE
from v4export.plugins.function_body import OPSET
from v4export.plugins.limits import MAX_ELEMENTS, MAX_TOPK
from v4export.plugins.moe_experts.onnx import input_scales, operands_of
from v4export.precision import Precision


@dataclass(frozen=True)
class Lint:
    """What was proved.

    Attributes:
        nodes_per_layer: node count of each kind of layer. A layer with experts has as many nodes as one that
            was traced with a single expert, so the count does not depend on the number of experts.
        experts_referenced: expert matrices that enter a MoeExperts node, summed over layers.
        bodies: custom ops, each with a portable body.
        formats: how many weights of each kind have each format, all as the recipe says.
        rounded_inputs: products whose inputs are rounded to FP8, a layer's experts counting as one.
    """

    nodes_per_layer: dict[str, int]
    experts_referenced: int
    bodies: tuple[str, ...]
    formats: dict[str, dict[str, int]]
    rounded_inputs: int = 0

    @classmethod
    def of_all(cls, found: Sequence[Lint]) -> Lint:
        """What was proved of several graphs that together are a model: counts are sums, pieces of weights counting."""
        formats: dict[str, Counter[str]] = defaultdict(Counter)
        for kind, counts in ((kind, counts) for one in found for kind, counts in one.formats.items()):
            formats[kind] += Counter(counts)
        return cls(
            {kind: count for one in found for kind, count in one.nodes_per_layer.items()},
            sum(one.experts_referenced for one in found),
            tuple(dict.fromkeys(body for one in found for body in one.bodies)),
            {kind: dict(counts) for kind, counts in formats.items()},
            sum(one.rounded_inputs for one in found),
        )


def lint(
    model: ir.Model,
    config: ModelConfig,
    precision: Precision,
    parts: Mapping[str, Part],
    layers: range | None = None,
    experts: Callable[[int], Sequence[int]] | None = None,
) -> Lint:
    """Check a portable graph.

    Args:
        model: the graph.
        config: of the model.
        precision: of the graph.
        parts: what it was stamped from.
        layers: that it has; all of the model's, unless given.
        experts: from a layer to the numbers of its experts that it has; all, unless given.

    Raises:
        NotSupported: names the rule that is broken and where.
    """
    lint_nodes(model)
    return Lint(
        _nodes_per_layer(model, config, precision, parts, layers or range(config.num_layers)),
        experts_referenced(model, experts or (lambda _: range(config.num_experts))),
        tuple(f"{domain}::{name}" for domain, name, _ in model.functions),
        check_formats(model, config, precision),
        check_roundings(model, config, precision),
    )


def lint_nodes(model: ir.Model) -> None:
    """What is to hold of any graph, whatever its layers are. Raises NotSupported."""
    imports = model.opset_imports
    if imports[""] != OPSET:
        raise _broken(f"opset {imports['']} where {OPSET} is meant")
    _every_custom_node_has_a_body(model)
    _few_are_selected(model)
    _bodies_serve_all_their_nodes(model)
    _nothing_is_added_by_scattering(model)
    _every_input_is_read(model)
    _every_initializer_is_used_and_fits(model)


def walk(nodes: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """All nodes, those of subgraphs included."""
    yield from ir.traversal.RecursiveGraphIterator(nodes)


def _everywhere(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of bodies included."""
    for graph in (model.graph, *model.functions.values()):
        yield from walk(graph)


def _few_are_selected(model: ir.Model) -> None:
    """A custom op that selects has an attribute for it; its body's TopK takes so many, or all where there are fewer."""
    for node in _everywhere(model):
        for name in ("top_k", "top_blocks"):
            k = node.attributes.get(name)
            if node.domain and k is not None and k.as_int() > MAX_TOPK:
                raise NotSupported(
                    f"{node.op_type} selects more than TensorRT's TopK can",
                    f"{node.name}: {name} = {k.as_int()}, at most {MAX_TOPK}",
                    "Give the model a config.json that selects fewer, if its authors allow that.",
                )


def _nothing_is_added_by_scattering(model: ir.Model) -> None:
    for node in _everywhere(model):
        reduction = node.attributes.get("reduction")
        if node.op_type.startswith("Scatter") and reduction is not None and reduction.as_string() != "none":
            raise _broken(f"{node.name}: {node.op_type} with reduction {reduction.as_string()}, which TensorRT refuses")


def _every_custom_node_has_a_body(model: ir.Model) -> None:
    for node in _everywhere(model):
        if not node.domain:
            continue
        op = BY_NODE.get((node.domain, node.op_type))
        by_itself = op is not None and op.function is None
        if not by_itself and (node.domain, node.op_type, node.overload) not in model.functions:
            raise _broken(f"{node.name}: {node.domain}::{node.op_type} has no function in the model")
        if op is None:
            raise _broken(f"{node.name}: {node.domain}::{node.op_type} is not one of the project's ops")


def _bodies_serve_all_their_nodes(model: ir.Model) -> None:
    """A body is written for the first node of its type: what others have differently, it must read from the node."""
    for (domain, name, overload), function in model.functions.items():
        nodes = [n for n in _everywhere(model) if (n.domain, n.op_type, n.overload) == (domain, name, overload)]
        read = {a.ref_attr_name for n in walk(function) for a in n.attributes.values() if a.is_ref()}
        for attribute in function.attributes:
            values = {str(n.attributes[attribute].value) for n in nodes if attribute in n.attributes}
            if len(values) > 1 and attribute not in read:
                raise _broken(f"{domain}::{name} stands in the graph with {attribute} of {', '.join(sorted(values))}")
        counts = sorted({len(n.inputs) for n in nodes})
        if len(counts) > 1:
            raise _broken(f"{domain}::{name} stands in the graph with {' and '.join(map(str, counts))} inputs")


def _every_input_is_read(model: ir.Model) -> None:
    for value in model.graph.inputs:
        if not value.uses():
            raise _broken(f"input {value.name} is in the graph and nothing reads it, so TensorRT would leave it out")


def _every_initializer_is_used_and_fits(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        if not value.uses():
            raise _broken(f"weight {name} is in the graph and nothing reads it")
        assert value.const_value is not None
        if value.const_value.size > MAX_ELEMENTS:
            raise _broken(f"weight {name} has {value.const_value.size} elements, more than {MAX_ELEMENTS}")


def _nodes_per_layer(
    model: ir.Model, config: ModelConfig, precision: Precision, parts: Mapping[str, Part], layers: range
) -> dict[str, int]:
    """A layer has the nodes of its traced part, which held one expert at most; one of them evaluates all experts."""
    by_layer = Counter(int(n.name.split(".")[1]) for n in model.graph if n.name and n.name.startswith("layers."))
    experts = Counter(int((n.name or "").split(".")[1]) for n in model.graph if n.op_type == "MoeExperts")
    counts: dict[str, int] = {}
    for layer in layers:
        kind = kind_of(config, precision, layer)
        counts[kind] = len(parts[kind].graph)
        if by_layer[layer] != counts[kind]:
            raise _broken(f"layer {layer} has {by_layer[layer]} nodes, a {kind} layer with one expert {counts[kind]}")
        if experts[layer] != config.is_moe(layer):
            raise _broken(f"layer {layer} ({kind}) has {experts[layer]} MoeExperts nodes")
    return counts


def experts_referenced(model: ir.Model, experts: Callable[[int], Sequence[int]]) -> int:
    """Every expert's three matrices enter their layer's node, each once and in order, and so do their multipliers."""
    total = 0
    for node in (n for n in model.graph if n.op_type == "MoeExperts"):
        layer = (node.name or "").split(".")[1]
        matrices = [
            f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight"
            for part in ("gate", "up", "down")
            for e in experts(int(layer))
        ]
        kinds = ("", SCALE, SCALE_2)[: operands_of(node.attributes["format"].as_string())]
        wanted = [name + kind for kind in kinds for name in matrices]
        behind = len(input_scales(node))  # proved by check_roundings
        if [v.name for v in node.inputs[3 : len(node.inputs) - behind] if v is not None] != wanted:
            raise _broken(f"layer {layer}: its expert matrices are not all there, in order")
        total += len(matrices)
    return total


def _broken(rule: str) -> NotSupported:
    return NotSupported("the exported graph breaks a rule", rule, "this is a defect of v4export; please report it")
