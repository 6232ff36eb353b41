"""Products with integer matrices as onnxruntime's ``MatMulNBits``, which reads four or eight bits a number.

A matrix that is widened to bfloat16 and does nothing but multiply such activations is taken; one that is used
otherwise, as absorbed attention cuts up-projections by heads, stays widened. The node does not round integers times
multipliers to bfloat16, as widening does: it is off by less than what activations are rounded by.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from v4export.graphs.passes.replaced import replace
from v4export.graphs.repacked import BITS, COLUMNS, Repacking, linear
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE
from v4export.plugins.function_body import Body
from v4export.plugins.int4_dequantize.onnx import OP_TYPE as INT4_DEQUANTIZE

DOMAIN = "com.microsoft"
OP_TYPE = "MatMulNBits"

_FORMATS = {(BLOCK_DEQUANTIZE, ir.DataType.INT8): "int8", (INT4_DEQUANTIZE, ir.DataType.INT4): "int4"}


@dataclass(frozen=True)
class _Matrix:
    """A stored matrix and the products it is in."""

    name: str
    bits: int
    shape: tuple[int, int]
    products: tuple[ir.Node, ...]


def nbits_linear(model: ir.Model, repacking: Repacking) -> bool:
    """Replace in place every product with an integer matrix that is only multiplied with; whether there was any.

    Functions must not have been inlined.
    """
    graph, found = model.graph, False
    for node in list(graph):
        matrix = _matrix(node)
        if matrix is None:
            continue
        numbers, scales = (repacking.value(graph, one) for one in linear(matrix.name, matrix.bits, *matrix.shape))
        for product in matrix.products:
            body = Body(f"{product.name}.")
            x, _, *bias = product.inputs
            operands = [x, numbers, scales, *([None, None, *bias] if bias else [])]
            N, K = matrix.shape
            sizes = {"N": N, "K": K, "bits": matrix.bits, "block_size": COLUMNS}
            y = body.op(OP_TYPE, *operands, domain=DOMAIN, accuracy_level=0, **sizes)
            replace(graph, product, [product], body.nodes, product.outputs, [y])
            found = True
    if found:
        graph.opset_imports[DOMAIN] = 1
    return found


def _matrix(node: ir.Node) -> _Matrix | None:
    stored = node.inputs[0] if node.inputs else None
    tensor = stored.const_value if stored is not None else None
    if not isinstance(tensor, ir.ExternalTensor) or stored is None or stored.name is None:
        return None
    name = _FORMATS.get((node.op_type, tensor.dtype))
    if name is None or not _blocks_are_known(node):
        return None
    shape = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
    products = _products(node.outputs[0])
    return _Matrix(stored.name, BITS[name], shape, products) if products and len(shape) == 2 else None


def _blocks_are_known(node: ir.Node) -> bool:
    a = node.attributes
    if "block_size" in a:
        return a["block_size"].as_int() == COLUMNS
    return tuple(a["block_shape"].as_ints()) == (1, COLUMNS)


def _products(wide: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that multiply by the matrix's transpose; none where there is another use."""
    uses = wide.uses()
    if wide.dtype != ir.DataType.BFLOAT16 or not all(index == 1 and _plain(user) for user, index in uses):
        return ()
    return tuple(user for user, _ in uses)


def _plain(node: ir.Node) -> bool:
    """Whether it is a product with its second operand's transpose, and maybe a bias."""
    a = {name: attribute.value for name, attribute in node.attributes.items()}
    factors = a.get("alpha", 1.0), a.get("beta", 1.0)
    return node.op_type == "Gemm" and factors == (1.0, 1.0) and a.get("transB", 0) == 1 and a.get("transA", 0) == 0
