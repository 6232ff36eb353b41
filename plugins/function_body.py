"""Writes the portable body of a custom op: a model-local ONNX function made of standard operators.

Every runtime that has no kernel for the op inlines the body, so the body is the op's definition on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape
from onnxscript import values

#: ai.onnx opset of every graph and body. onnxruntime's CPU provider has an Attention kernel up to 24 only, and
#: RMSNormalization and RotaryEmbedding exist from 23 on.
OPSET = 23

#: Domain, plugin namespace and version of the project's own ops.
DOMAIN = "v4"
VERSION = 1


@functools.cache
def opset(domain: str) -> values.Opset:
    """Writes nodes of a domain while torch.onnx translates."""
    return values.Opset(domain, VERSION)


def first_dtype(node: ir.Node) -> ir.DataType:
    """The dtype of a node's first operand, for ops that keep it."""
    first = node.inputs[0]
    assert first is not None and first.dtype is not None
    return first.dtype


#: What every custom node carries so that TensorRT's parser prefers a registered plugin to the body.
PLUGIN_HINTS: Mapping[str, str] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


class Body:
    """Collects the nodes of one function body (or of a subgraph inside one).

    Args:
        prefix: starts every value's name. ONNX wants names unique across a graph and the subgraphs inside it.
    """

    def __init__(self, prefix: str = "") -> None:
        self._tape, self._prefix = tape.Tape(), prefix

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes so far, in order."""
        return self._tape.nodes

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        value = self._tape.op(op_type, inputs, attributes=attributes or None, domain=domain)
        self._name([value], op_type)
        return value

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node with several outputs, all of them named (TensorRT's TopK refuses unnamed ones)."""
        values = self._tape.op_multi_out(
            op_type, inputs, attributes=attributes or None, num_outputs=outputs, domain=domain
        )
        self._name(values, op_type)
        return values

    def _name(self, outputs: Sequence[ir.Value], op_type: str) -> None:
        """Name the newest node and its outputs."""
        node = self.nodes[-1]
        node.name = f"{self._prefix}{op_type}_{len(self.nodes)}"
        for i, value in enumerate(outputs):
            value.name = f"{node.name}_{i}" if i else node.name

    def const(self, value: Any, dtype: type = np.int64) -> ir.Value:
        """A constant; int64 unless said otherwise."""
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype)))

    def attribute(self, name: str) -> ir.Value:
        """An integer attribute of the calling node, as int64: nodes that differ in it share the body."""
        return self.op("Constant", value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A cast to ``dtype``."""
        return self.op("Cast", value, to=int(dtype))

    def convert(self, value: ir.Value, of: ir.DataType | None, to: ir.DataType) -> ir.Value:
        """The same as ``to``: a cast unless it is ``of`` that type already."""
        return value if of == to else self.cast(value, to)

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension of a tensor, as int64 [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: ir.Value, *dims: int | ir.Value) -> ir.Value:
        """Reshape; a dimension is a number, or an int64 [1] value."""
        if all(isinstance(d, int) for d in dims):
            return self.op("Reshape", value, self.const(list(dims)))
        parts = [self.const([d]) if isinstance(d, int) else d for d in dims]
        return self.op("Reshape", value, self.op("Concat", *parts, axis=0))

    def arange(self, length: ir.Value) -> ir.Value:
        """0 .. length-1 as int64, from an int64 [1] length."""
        return self.op("Range", self.const(0), self.op("Squeeze", length), self.const(1))

    def subgraph(self, name: str, inputs: Sequence[ir.Value], write: Callable[[Body], Sequence[ir.Value]]) -> ir.Graph:
        """A graph attribute for If or Loop; ``write`` adds its nodes and returns its outputs."""
        inner = Body(f"{self._prefix}{name}.")
        outputs = write(inner)
        return ir.Graph(inputs, outputs, nodes=inner.nodes, opset_imports={"": OPSET}, name=name)


def make_function(
    name: str,
    inputs: Sequence[ir.Value],
    write: Callable[[Body], Sequence[ir.Value]],
    attributes: Iterable[str],
    domain: str = DOMAIN,
) -> ir.Function:
    """A model-local function ``domain::name``.

    Args:
        name: op type of the nodes that call it.
        inputs: its formal inputs, in order.
        write: adds the nodes and returns the outputs.
        attributes: names of the attributes a calling node may carry. The body bakes their values in; they are
            declared because a TensorRT plugin reads them from the node.
        domain: domain of the nodes that call it.
    """
    body = Body()
    outputs = write(body)
    imports = {"": OPSET, **dict.fromkeys({node.domain for node in body.nodes} - {""}, VERSION)}
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports=imports, name=name)
    declared = [ir.Attr(attribute, ir.AttributeType.UNDEFINED, None) for attribute in attributes]
    return ir.Function(domain, name, graph=graph, attributes=declared)
