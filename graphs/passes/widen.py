"""16-bit floats carried in float32, rounded where the portable graph rounds, for onnxruntime on a CPU.

onnxruntime's CPU provider has no bfloat16 arithmetic and converts float16 weights anyway. Here every 16-bit tensor of
the graph becomes a float32 tensor that holds 16-bit values: arithmetic is float32, and its result is rounded to the
16-bit type and back. That is what a GPU does that multiplies 16-bit numbers and accumulates in float32, so a check on a
CPU checks the precision that will run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from v4export.plugins.block_dequantize.onnx import OP_TYPE as BLOCK_DEQUANTIZE

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

#: Operators whose output type is an attribute.
_NAMES_ITS_TYPE = {"Cast": "to", BLOCK_DEQUANTIZE: "output_dtype", "DequantizeLinear": "output_dtype"}

#: Operators that only move values: what was representable stays so, and nothing needs rounding.
MOVES = frozenset(
    (
        "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "ScatterElements",
        "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip


def widen(model: ir.Model, kernels: Collection[str] = ()) -> bool:
    """Rewrite the graph in place; functions must have been inlined and types inferred. Whether anything changed.

    ``kernels`` are operators that read inputs and initialisers of the graph as they are, and round by themselves.
    """
    widened = _Widen(model.graph, kernels)
    return widened.run()


class _Widen:
    def __init__(self, graph: ir.Graph, kernels: Collection[str]) -> None:
        self.graph, self.kernels = graph, kernels
        #: The float32 stand-in of each 16-bit graph input or initialiser.
        self.stand_ins: dict[ir.Value, ir.Value] = {}
        self.changed = False

    def run(self) -> bool:
        narrow_outputs = [(i, v.dtype) for i, v in enumerate(self.graph.outputs) if v.dtype in NARROW]
        for node in list(self.graph):
            self._rewrite(node)
        for index, dtype in narrow_outputs:
            value = self.graph.outputs[index]
            if value.dtype == ir.DataType.FLOAT and dtype is not None:
                name, value.name = value.name, f"{value.name}.wide"
                cast = self._cast(value, dtype, name)
                assert value.producer() is not None
                self.graph.append(cast)
                self.graph.outputs[index] = cast.outputs[0]
        return self.changed

    def _rewrite(self, node: ir.Node) -> None:
        narrow = [o.dtype for o in node.outputs if o.dtype in NARROW]
        reads_table = node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None
        if node.op_type in _NAMES_ITS_TYPE:
            self._read_wide(node)
            target = node.outputs[0].dtype
            if target in NARROW:
                attribute = _NAMES_ITS_TYPE[node.op_type]
                node.attributes[attribute] = ir.AttrInt64(attribute, int(ir.DataType.FLOAT))
                self._round(node, [target])
            return
        if reads_table and narrow:
            # Rows are looked up in the 16-bit table as it lies in the file, then widened.
            self._after(node, node.outputs[0], (ir.DataType.FLOAT,))
            return
        self._read_wide(node)
        if narrow and (node.op_type in MOVES or node.op_type in self.kernels):
            for output in node.outputs:
                output.dtype = ir.DataType.FLOAT
        elif narrow:
            self._round(node, narrow)

    def _read_wide(self, node: ir.Node) -> None:
        as_stored = node.op_type in self.kernels
        for index, value in enumerate(node.inputs):
            if value is None or (as_stored and value.producer() is None):
                continue
            if value.dtype in NARROW:
                node.replace_input_with(index, self._wide(value))
                self.changed = True

    def _wide(self, value: ir.Value) -> ir.Value:
        """The float32 stand-in of a 16-bit input or initialiser."""
        if value not in self.stand_ins:
            cast = self._cast(value, ir.DataType.FLOAT, f"{value.name}.wide")
            self.graph.insert_before(self.graph[0], cast)
            self.stand_ins[value] = cast.outputs[0]
        return self.stand_ins[value]

    def _round(self, node: ir.Node, narrow: Sequence[ir.DataType | None]) -> None:
        """Round the node's outputs to their 16-bit type, and carry on in float32."""
        for output, dtype in zip(node.outputs, narrow, strict=True):
            assert dtype is not None
            output.dtype = ir.DataType.FLOAT
            self._after(node, output, (dtype, ir.DataType.FLOAT))

    def _after(self, node: ir.Node, output: ir.Value, dtypes: Sequence[ir.DataType]) -> None:
        """Append casts to an output; the last keeps the output's name and its readers."""
        readers = list(output.uses())
        is_graph_output = output.is_graph_output()
        name, value, at = output.name, output, node
        output.name = f"{name}.exact"
        for step, dtype in enumerate(dtypes, 1):
            cast = self._cast(value, dtype, name if step == len(dtypes) else f"{name}.rounded")
            self.graph.insert_after(at, cast)
            value, at = cast.outputs[0], cast
        for reader, index in readers:
            reader.replace_input_with(index, value)
        if is_graph_output:
            self.graph.outputs[list(self.graph.outputs).index(output)] = value
        self.changed = True

    @staticmethod
    def _cast(value: ir.Value, dtype: ir.DataType, name: str | None) -> ir.Node:
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        return ir.Node(
            "", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"{name}.to_{dtype.name}"
        )
