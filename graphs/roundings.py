"""Whether what FP8 matrices multiply is rounded where the recipe says so, and by the scale of its own module.

A rounding that is missing moves a result by less than rounding itself may, so running prompts would not show it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from v4export.checkpoint.activation_scales import scale_names
from v4export.config import ModelConfig
from v4export.errors import NotSupported
from v4export.graphs.variants import roles
from v4export.plugins.moe_experts.onnx import OP_TYPE as EXPERTS
from v4export.plugins.moe_experts.onnx import input_scales
from v4export.precision import Precision

#: Between a stored matrix and its product, also where it is widened by a body that has been put in place.
_WIDENS = frozenset(("TRT_BlockDequantize", "Cast", "Mul", "Reshape", "Transpose", "Identity"))
#: Between a rounded input and its product: results of 16 bits are carried in float32.
_CARRIES = frozenset(("Cast", "Identity"))
_PRODUCTS = ("Gemm", "MatMul")
#: Matrices that read what a scale is of.
_READERS = {"input_scale": 2, "middle_scale": 1}


def check_roundings(model: ir.Model, config: ModelConfig, precision: Precision) -> int:
    """Prove it of a portable graph; how many products have rounded inputs, a layer's experts counting as one.

    Raises:
        NotSupported: names the first that is not as it has to be.
    """
    found = list(_checked(model, config, precision))
    faults = [fault for fault in found if fault]
    if faults:
        raise NotSupported(
            "the graph does not round inputs as its recipe says",
            faults[0],
            "this is a defect of v4export; please report it",
        )
    return len(found)


def rounding_faults(
    portable: ir.Model, lowered: ir.Model, config: ModelConfig, precision: Precision
) -> tuple[str, ...]:
    """What is wrong with a portable graph, and with onnxruntime's copy of it for a CPU, a line each."""
    lost = (name for name in portable.graph.initializers if _is_scale(name) and name not in lowered.graph.initializers)
    found = (*_checked(portable, config, precision), *_checked(lowered, config, precision))
    return (*(fault for fault in found if fault), *(f"nothing is rounded by {name}" for name in lost))


def _checked(model: ir.Model, config: ModelConfig, precision: Precision) -> Iterator[str | None]:
    """Of every product whose input has to be rounded, or is, what is wrong with it."""
    for name, role in roles(config).items():
        wanted = scale_names(name, role) if precision.rounds_inputs_of(name, role) else ()
        matrix = model.graph.initializers.get(name)
        if role == "linear" and matrix is not None:
            for product in _products(matrix):
                found = tuple(_rounded_by(product.inputs[0]))
                if wanted or found:
                    fault = f"what {name} multiplies is rounded by {_said(found)}, in {product.name}"
                    yield None if found == wanted else fault
    nodes = [node for node in model.graph if node.op_type == EXPERTS]
    for node in nodes:
        yield from _of_node(node, precision)
    if not nodes and precision.inputs:  # onnxruntime's copy takes experts one by one
        for name in [n for n in model.graph.initializers if _is_scale(n) and ".experts." in n]:
            yield _of_loop(model.graph.initializers[name])


def _of_node(node: ir.Node, precision: Precision) -> Iterator[str | None]:
    """Of experts in one node."""
    first = node.inputs[3]
    assert first is not None and first.name is not None
    wanted = scale_names(first.name, "expert") if precision.rounds_inputs_of(first.name, "expert") else ()
    found = tuple(str(value.name) for value in input_scales(node))
    if wanted or found:
        yield None if found == wanted else f"{node.name} rounds by {_said(found)}, expected {_said(wanted)}"


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _READERS


def _of_loop(scales: ir.Value) -> str | None:
    """Of scales of experts: the chosen one's divides and multiplies again around a rounding, ahead of each product."""
    products = 0
    for gather, _ in scales.uses():
        for node, _ in gather.outputs[0].uses():
            if node.op_type == "Mul" and _rounds(node, gather.outputs[0]):
                products += sum(product.op_type in _PRODUCTS for product in _after(node.outputs[0]))
    expected = _READERS[str(scales.name).rpartition(".")[2]]
    return None if products == expected else f"{scales.name} rounds the inputs of {products} products, not {expected}"


def _rounds(wide: ir.Node, scale: ir.Value) -> bool:
    """Whether a node multiplies what was divided by the same scale and rounded to FP8."""
    chain = wide
    for op_type in ("DequantizeLinear", "QuantizeLinear", "Div"):
        value = chain.inputs[0]
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return False
        chain = producer
    return chain.inputs[1] is scale


def _products(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that multiply by a matrix."""
    for node, _ in value.uses():
        if node.op_type in _PRODUCTS:
            yield node
        elif node.op_type in _WIDENS:
            yield from _products(node.outputs[0])


def _after(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a value, or what it is carried in."""
    for node, _ in value.uses():
        if node.op_type in _CARRIES:
            yield from _after(node.outputs[0])
        else:
            yield node


def _rounded_by(value: ir.Value | None) -> Iterator[str]:
    """The name of the scale by which a product's operand is rounded to FP8, if it is."""
    wide = value.producer() if value is not None else None
    while wide is not None and wide.op_type in _CARRIES:
        carried = wide.inputs[0]
        wide = carried.producer() if carried is not None else None
    codes = wide.inputs[0] if wide is not None and wide.op_type == "DequantizeLinear" else None
    narrow = codes.producer() if codes is not None else None
    if wide is None or narrow is None or narrow.op_type != "QuantizeLinear" or narrow.inputs[1] is not wide.inputs[1]:
        return
    if narrow.attributes["output_dtype"].as_int() == ir.DataType.FLOAT8E4M3FN and narrow.inputs[1] is not None:
        yield str(narrow.inputs[1].name)


def _said(names: tuple[str, ...]) -> str:
    return " and ".join(names) or "nothing"
