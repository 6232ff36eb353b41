"""How exactly onnxruntime's kernels for integer matrices multiply, set when a session is made.

Their ``accuracy_level`` means what it does to onnxruntime: 0 multiplies activations as they are, 4 rounds them to
eight bits, a multiplier for every 32. The graph on disk has level 0. There is no kernel that multiplies integers of
eight bits at level 0: ``MatMulNBits`` widens its matrix anew in every run, in ten times the time. So those are widened
once, when the session is made, and rounded as the portable graph rounds. ``QMoE``, which widens chosen experts only, is
told by a variable of the environment (``v4export/runtime/sessions.py``).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4export.graphs.passes import nbits_experts, nbits_linear
from v4export.graphs.passes.replaced import replace
from v4export.plugins.function_body import Body

#: Activations in eight bits.
INT8_ACTIVATIONS = 4
LEVELS = (0, INT8_ACTIVATIONS)


def is_widened(node: ir.Node) -> bool:
    """Whether a node's matrix is widened at level 0, so that the graph on disk is not the one that is run."""
    return node.op_type == nbits_linear.OP_TYPE and node.attributes["bits"].as_int() == 8


def set_accuracy(model: ir.Model, level: int) -> bool:
    """Let every such node compute at that level, in place; whether there was any."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type in (nbits_linear.OP_TYPE, nbits_experts.OP_TYPE)]
    for node in nodes:
        if level == 0 and is_widened(node):
            body = Body(f"{node.name}.")
            y = _widened(body, node)
            replace(graph, node, [node], body.nodes, node.outputs, [y])
        else:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return bool(nodes)


def _widened(b: Body, node: ir.Node) -> ir.Value:
    """The product with the matrix widened, which onnxruntime does while it loads the graph."""
    x, numbers, scales, *others = node.inputs
    assert numbers is not None
    a = node.attributes
    signed = b.op("Sub", b.cast(numbers, ir.DataType.FLOAT), b.const(128, np.float32))
    blocks = b.op("Mul", signed, b.op("Unsqueeze", scales, b.const([-1])))
    wide = b.cast(b.cast(blocks, ir.DataType.BFLOAT16), ir.DataType.FLOAT)
    matrix = b.reshape(wide, a["N"].as_int(), a["K"].as_int())
    return b.op("Gemm", x, matrix, *others[2:], transB=1)
