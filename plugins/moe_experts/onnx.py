"""moe_experts as ONNX: the body in standard operators, whose node count does not depend on the number of experts.

Expert matrices enter one by one, because that is how checkpoints store them and a file can only be pointed at where its
bytes already lie in the wanted order. The body stacks them and gathers each token's K experts, so that only chosen
experts are read; the lowering for onnxruntime never stacks.

There is no control flow: TensorRT refuses some nestings of If and Loop, and hoists the widening of FP8 stacks out of a
loop, which would read every expert at every step. The price is scratch memory for the gathered matrices,
M * K * 3 * F * D numbers, which bounds how many tokens a step of an engine should have.

A stack of all experts may have more elements than TensorRT takes in a tensor (``limits.py``). Such a stack is cut
along its matrices' rows, and so is the product; every part is read for the chosen experts alone, as the whole would be.

Packed E2M1 matrices are initialisers of ONNX's type FLOAT4E2M1, whose bytes are the checkpoint's: the even column in
the low bits. TRT_BlockDequantize widens them to the type of their multipliers, exactly, as these are powers of two. The
standard DequantizeLinear would do, but TensorRT-RTX 1.7 refuses to inline one of the same name for a second layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from v4export.plugins.block_dequantize.onnx import dequantize
from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.limits import MAX_ELEMENTS

OP_TYPE = "MoeExperts"
ATTRIBUTES = {"num_experts": "INT", "rows": "INT", "columns": "INT", "format": "STRING", "limit": "FLOAT"}
OUTPUTS = (first_dtype,)

#: Values of attribute ``format``: matrices in the tokens' type, FP8 with block multipliers, packed E2M1.
PLAIN, FP8, FP4 = "", "fp8", "fp4"


def translate(x, weights, indices, gate, up, down, gate_scale, up_scale, down_scale, rows, columns, limit):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op. Its packed matrices are uint8 here and FLOAT4E2M1 in the finished graph."""
    scaled = FP4 if gate[0].dtype == ir.DataType.UINT8 else FP8
    return opset(DOMAIN).MoeExperts(
        x,
        weights,
        indices,
        *gate,
        *up,
        *down,
        *gate_scale,
        *up_scale,
        *down_scale,
        num_experts=len(gate),
        rows=rows,
        columns=columns,
        format=scaled if len(gate_scale) > 0 else PLAIN,
        limit=limit or 0.0,
        **PLUGIN_HINTS,
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (x [M,D], weights [M,K], indices [M,K], E gates, E ups, E downs, then their scales) -> y [M,D].

    Matrices are [1, F, D] or [1, D, F], so that stacks are plain concatenations.
    """
    a = node.attributes
    count, stored, limit = a["num_experts"].as_int(), a["format"].as_string(), a["limit"].as_float()
    dtype = node.outputs[0].dtype
    if dtype is None:
        raise ValueError(f"{node.name}: the type of {OP_TYPE}'s output must be known")
    block = [1, a["rows"].as_int(), a["columns"].as_int()]
    x, weights, indices = ir.val("x"), ir.val("weights"), ir.val("indices")
    kinds = ("",) if stored == PLAIN else ("", "_scale")
    names = [f"{part}{kind}" for kind in kinds for part in ("gate", "up", "down")]
    operands = [[ir.val(f"{name}_{e}") for e in range(count)] for name in names]

    def product(b: Body, part: int, vector: ir.Value) -> ir.Value:
        """Each token's K matrices of one part, widened, times its vectors: [M, K, rows, 1]."""
        matrices, shape = operands[part], _shape(node, 3 + part * count)
        if stored != PLAIN:
            # E2M1 has multipliers in bfloat16, and TensorRT widens it to their type alone.
            wide = ir.DataType.BFLOAT16 if stored == FP4 else dtype
            pairs = zip(matrices, operands[3 + part], strict=True)
            matrices = [dequantize(b, w, scale, shape, block, wide) for w, scale in pairs]
        products = []
        for stack in stacks(b, matrices, *shape[-2:]):
            gathered = b.op("Gather", stack, indices, axis=0)
            if stored == FP4 and dtype != ir.DataType.BFLOAT16:
                gathered = b.cast(gathered, dtype)
            products.append(b.op("MatMul", gathered, vector))
        return products[0] if len(products) == 1 else b.op("Concat", *products, axis=2)

    def write(b: Body) -> list[ir.Value]:
        column = b.op("Unsqueeze", x, b.const([1, 3]))
        h = swiglu(b, product(b, 0, column), product(b, 1, column), dtype, limit)
        out = b.cast(b.op("Squeeze", product(b, 2, h), b.const([3])), ir.DataType.FLOAT)
        share = b.op("Mul", out, b.op("Unsqueeze", weights, b.const([2])))
        y = b.cast(b.op("ReduceSum", share, b.const([1]), keepdims=0), dtype)
        y.name = "y"
        return [y]

    inputs = [x, weights, indices, *(v for operand in operands for v in operand)]
    return make_function(OP_TYPE, inputs, write, [*ATTRIBUTES, *PLUGIN_HINTS])


def _shape(node: ir.Node, position: int) -> list[int]:
    """The shape of an operand that is an initialiser."""
    value = node.inputs[position]
    if value is None or value.shape is None:
        raise ValueError(f"{node.name}: the shapes of {OP_TYPE}'s matrices must be known")
    return [int(d) for d in value.shape]  # type: ignore[arg-type]


def parts(count: int, rows: int, columns: int) -> int:
    """In how many parts a stack of ``count`` matrices is made: as few as TensorRT takes.

    A part has all matrices and as many rows, the last may have fewer. The same number of groups, which have as many
    matrices and all rows, is small enough too.

    Raises:
        ValueError: one matrix, or one row of all of them, is too large.
    """
    for number in range(1, max(count, rows) + 1):
        if max(-(-count // number) * rows, count * -(-rows // number)) * columns <= MAX_ELEMENTS:
            return number
    raise ValueError(f"{count} matrices [{rows}, {columns}] cannot be stacked in tensors of {MAX_ELEMENTS} elements")


def stacks(b: Body, matrices: Sequence[ir.Value], rows: int, columns: int) -> list[ir.Value]:
    """The matrices [1, rows, columns] of all experts as one stack, or cut along their rows as several.

    Groups of experts are stacked, cut, and their cuts joined. Cutting every expert by itself comes to the same and
    takes TensorRT time that grows with the square of their number.
    """
    number = parts(len(matrices), rows, columns)
    if number == 1:
        return [b.op("Concat", *matrices, axis=0)]
    size, height = -(-len(matrices) // number), -(-rows // number)
    groups = [b.op("Concat", *matrices[i : i + size], axis=0) for i in range(0, len(matrices), size)]
    heights = [min(height, rows - first) for first in range(0, rows, height)]
    cuts = [b.ops("Split", group, b.const(heights), outputs=len(heights), axis=1) for group in groups]
    return [b.op("Concat", *cut, axis=0) for cut in zip(*cuts, strict=True)]


def swiglu(b: Body, gate: ir.Value, up: ir.Value, dtype: ir.DataType, limit: float) -> ir.Value:
    """silu(gate) * up in float32, as ``dtype``; a limit other than 0 cuts gate off above it and up on both sides."""
    if dtype != ir.DataType.FLOAT:
        gate, up = b.cast(gate, ir.DataType.FLOAT), b.cast(up, ir.DataType.FLOAT)
    if limit:
        top = b.const(limit, np.float32)
        gate, up = b.op("Min", gate, top), b.op("Clip", up, b.const(-limit, np.float32), top)
    product = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return product if dtype == ir.DataType.FLOAT else b.cast(product, dtype)
