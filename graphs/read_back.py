"""Formats of weights as a finished graph has them, held against what the recipe asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import onnx_ir as ir

from v4export.checkpoint.formats import grid
from v4export.checkpoint.names import SCALE
from v4export.config import ModelConfig
from v4export.errors import NotSupported
from v4export.graphs.shards import EXPONENTS, numpy_dtype
from v4export.graphs.variants import roles
from v4export.graphs.weights import SCALE_2
from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE
from v4export.plugins.block_dequantize.onnx import at_least_two_blocks
from v4export.plugins.int4_dequantize.onnx import OP_TYPE as INT4_DEQUANTIZE
from v4export.precision import Format, Precision

_NUMBER = re.compile(r"\.\d+(?=\.)")


def check_formats(model: ir.Model, config: ModelConfig, precision: Precision) -> dict[str, dict[str, int]]:
    """Prove that every weight is stored, and widened, as its recipe says.

    Returns:
        how many weights of each kind (a name without numbers of layers and experts) have each format.

    Raises:
        NotSupported: one is not; names it.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, role in roles(config).items():
        value = model.graph.initializers.get(name)
        if value is None:
            continue  # not of this graph
        format = precision.format_of(name, role)
        fault = _fault(model.graph, value, format)
        if fault:
            raise NotSupported(
                f"the graph does not hold {name} as {format.name}",
                fault,
                "this is a defect of v4export; please report it",
            )
        of_kind = counts.setdefault(_NUMBER.sub(".*", name), {})
        of_kind[format.name] = of_kind.get(format.name, 0) + 1
    return counts


def _fault(graph: ir.Graph, value: ir.Value, format: Format) -> str | None:
    if value.dtype != _type(format.dtype):
        return f"its numbers are {value.dtype}"
    parts = {SCALE: format.scale, SCALE_2: "float32"} if format.outer else {SCALE: format.scale}
    for suffix in (SCALE, SCALE_2):
        scale, wanted = graph.initializers.get(f"{value.name}{suffix}"), parts.get(suffix) if format.scaled else None
        if scale and scale.dtype == _type(EXPONENTS) and format.power_of_two and _is_read_by(value, "MoeExperts"):
            continue
        if (scale.dtype if scale else None) != (_type(wanted) if wanted else None):
            return f"{value.name}{suffix} is {scale.dtype if scale else 'missing'}, expected {wanted}"
    if not format.block:
        return None
    *_, rows, width = (int(d) for d in value.shape or ())
    block = format.block[0], format.columns(width)
    multipliers = tuple(int(d) for d in (graph.initializers[f"{value.name}{SCALE}"].shape or ())[-2:])
    if multipliers != grid((rows, width), block):
        return f"its multipliers are {list(multipliers)}, expected blocks of {list(block)}"
    for node in (use.node for use in value.uses()):
        if not _READERS.get(node.op_type, _unknown)(node, format, (rows, width), block):
            return f"{node.op_type} {node.name} reads it as something else"
    return None


def _is_read_by(value: ir.Value, op_type: str) -> bool:
    return all(use.node.op_type == op_type for use in value.uses())


def _type(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(numpy_dtype(dtype))


Reader = Callable[[ir.Node, Format, Sequence[int], tuple[int, int]], bool]


def _block_dequantize(node: ir.Node, format: Format, shape: Sequence[int], block: tuple[int, int]) -> bool:
    wanted = at_least_two_blocks(shape, block)
    return format.dtype != "int4" and list(node.attributes["block_shape"].as_ints()) == wanted


def _int4_dequantize(node: ir.Node, format: Format, shape: Sequence[int], block: tuple[int, int]) -> bool:
    a = node.attributes
    return (format.dtype, a["axis"].as_int(), a["block_size"].as_int()) == ("int4", 1, block[1])


def _experts(node: ir.Node, format: Format, shape: Sequence[int], block: tuple[int, int]) -> bool:
    a = node.attributes
    found = a["format"].as_string(), a["rows"].as_int(), a["columns"].as_int()
    return found == (format.name, *(format.block or ()))


def _unknown(*_: object) -> bool:
    return False


_READERS: dict[str, Reader] = {
    BLOCK_DEQUANTIZE: _block_dequantize,
    INT4_DEQUANTIZE: _int4_dequantize,
    "MoeExperts": _experts,
}
