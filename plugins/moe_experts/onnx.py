"""moe_experts as ONNX: the body in standard operators, whose node count does not depend on the number of experts.

Expert matrices enter one by one, because that is how checkpoints store them and a file can only be pointed at where its
bytes already lie in the wanted order. The body stacks them and gathers each token's K experts, so that only chosen
experts are read; the lowering for onnxruntime never stacks.

There is no control flow: TensorRT refuses some nestings of If and Loop, and hoists the widening of FP8 stacks out of a
loop, which would read every expert at every step. The price is scratch memory for the gathered matrices,
M * K * 3 * F * D numbers, which bounds how many tokens a step of an engine should have.

A stack of all experts may have more elements than TensorRT takes in a tensor (``limits.py``). Such a stack is cut
along its matrices' rows, and so is the product; every part is read for the chosen experts alone, as the whole would be.

Packed matrices are initialisers of ONNX's types FLOAT4E2M1 and INT4, whose bytes are the file's: the even column in the
low bits. TensorRT widens those with 16-bit multipliers to the type of their multipliers. Multipliers that are uint8 are
E8M0 numbers as a checkpoint has them, which TensorRT is given as bfloat16 (``graphs/passes/wide_multipliers.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from v4export.plugins.function_body import DOMAIN, PLUGIN_HINTS, Body, first_dtype, make_function, opset
from v4export.plugins.limits import MAX_ELEMENTS
from v4export.plugins.round_to_fp8.onnx import rounded
from v4export.plugins.widened import has_wide_scales, powers_of_two, widen

OP_TYPE = "MoeExperts"
ATTRIBUTES = {"num_experts": "INT", "rows": "INT", "columns": "INT", "format": "STRING", "limit": "FLOAT"}
OUTPUTS = (first_dtype,)

#: Value of attribute ``format`` where matrices have the tokens' type.
PLAIN = ""
#: Formats of stored matrices have a number of operands for each.
_OPERANDS = {PLAIN: 1, "nvfp4": 3}


def input_scales(node: ir.Node) -> tuple[ir.Value, ...]:
    """Of a node whose experts round what they multiply, the scales [E] of tokens and of what downs multiply."""
    a = node.attributes
    matrices = 3 * a["num_experts"].as_int() * operands_of(a["format"].as_string())
    return tuple(v for v in node.inputs[3 + matrices :] if v is not None)


def operands_of(stored: str) -> int:
    """How many operands a matrix has: itself, its multipliers, and theirs."""
    return _OPERANDS.get(stored, 2)


def translate(  # type: ignore[no-untyped-def]
    x, weights, indices, gate, up, down, gate_scale, up_scale, down_scale, gate_scale_2, up_scale_2, down_scale_2,
    format, rows, columns, limit, input_scale=None, middle_scale=None,
):  # fmt: skip
    """The node for a call of the torch op; packed matrices are uint8 here and have their own type in the graph."""
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
        *gate_scale_2,
        *up_scale_2,
        *down_scale_2,
        *(scale for scale in (input_scale, middle_scale) if scale is not None),
        num_experts=len(gate),
        rows=rows,
        columns=columns,
        format=format,
        limit=limit or 0.0,
        **PLUGIN_HINTS,
    )


def function(node: ir.Node) -> ir.Function:
    """The body: (x [M,D], weights [M,K], indices [M,K], E gates, E ups, E downs, then their scales) -> y [M,D].

    Behind them all may be two vectors [E], by which inputs are rounded.

    Matrices are [1, F, D] or [1, D, F], so that stacks are plain concatenations.
    """
    a = node.attributes
    count, stored, limit = a["num_experts"].as_int(), a["format"].as_string(), a["limit"].as_float()
    dtype = node.outputs[0].dtype
    if dtype is None:
        raise ValueError(f"{node.name}: the type of {OP_TYPE}'s output must be known")
    block = [1, a["rows"].as_int(), a["columns"].as_int()]
    x, weights, indices = ir.val("x"), ir.val("weights"), ir.val("indices")
    kinds = ("", "_scale", "_scale_2")[: operands_of(stored)]
    names = [f"{part}{kind}" for kind in kinds for part in ("gate", "up", "down")]
    operands = [[ir.val(f"{name}_{e}") for e in range(count)] for name in names]
    roundings = [ir.val(name) for name in ("input_scale", "middle_scale")] if input_scales(node) else []

    def product(b: Body, part: int, vector: ir.Value) -> ir.Value:
        """Each token's K matrices of one part, widened, times its vectors: [M, K, rows, 1]."""
        matrices, shape = operands[part], _shape(node, 3 + part * count)
        if stored != PLAIN:
            kinds = operands[part::3]
            if _dtype(node, 3 + (3 + part) * count) == ir.DataType.UINT8:
                kinds = [kinds[0], [powers_of_two(b, scale) for scale in kinds[1]], *kinds[2:]]
            matrices = [widen(b, stored, *_three(one), shape, block, dtype) for one in zip(*kinds, strict=True)]
        products = []
        for stack in stacks(b, matrices, *shape[-2:]):
            gathered = b.op("Gather", stack, indices, axis=0)
            if stored != PLAIN and not has_wide_scales(stored) and dtype != ir.DataType.BFLOAT16:
                gathered = b.cast(gathered, dtype)
            products.append(b.op("MatMul", gathered, vector))
        return products[0] if len(products) == 1 else b.op("Concat", *products, axis=2)

    def as_read(b: Body, vector: ir.Value, which: int) -> ir.Value:
        """Vectors [M, 1 or K, _, 1] as a token's K experts multiply them."""
        if not roundings:
            return vector
        scale = b.op("Unsqueeze", b.op("Gather", roundings[which], indices, axis=0), b.const([2, 3]))
        wide = rounded(b, b.convert(vector, dtype, ir.DataType.FLOAT), scale)
        return b.convert(wide, ir.DataType.FLOAT, dtype)

    def write(b: Body) -> list[ir.Value]:
        column = as_read(b, b.op("Unsqueeze", x, b.const([1, 3])), 0)
        h = as_read(b, swiglu(b, product(b, 0, column), product(b, 1, column), dtype, limit), 1)
        out = b.cast(b.op("Squeeze", product(b, 2, h), b.const([3])), ir.DataType.FLOAT)
        share = b.op("Mul", out, b.op("Unsqueeze", weights, b.const([2])))
        y = b.cast(b.op("ReduceSum", share, b.const([1]), keepdims=0), dtype)
        y.name = "y"
        return [y]

    inputs = [x, weights, indices, *(v for operand in operands for v in operand), *roundings]
    return make_function(OP_TYPE, inputs, write, [*ATTRIBUTES, *PLUGIN_HINTS])


def _three(operands: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """A matrix, its multipliers, and theirs if it has any."""
    w, scale, *scale_2 = operands
    return w, scale, scale_2[0] if scale_2 else None


def _dtype(node: ir.Node, position: int) -> ir.DataType | None:
    """The type of an operand."""
    value = node.inputs[position]
    return None if value is None else value.dtype


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
