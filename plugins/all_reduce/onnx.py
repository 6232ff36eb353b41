"""all_reduce as ONNX: the node that TensorRT knows.

It has no body, as no graph can compute it by itself: other runtimes refuse it, and for onnxruntime the graph is cut
there (``v4export/runtime/ranks.py``).
"""

from __future__ import annotations

from v4export.plugins.function_body import first_dtype, opset

OP_TYPE = "DistCollective"
DOMAIN = "trt"
ATTRIBUTES = {
    "collective_operation": "STRING",
    "reduce_op": "STRING",
    "nb_rank": "INT",
    "group_size": "INT",
    "root": "INT",
}
OUTPUTS = (first_dtype,)

function = None


def translate(x, ranks):  # type: ignore[no-untyped-def]
    """The node for a call of the torch op; without groups it is among all ranks of its communicator."""
    how = {"collective_operation": "all_reduce", "reduce_op": "sum", "group_size": 0, "root": -1}
    return opset(DOMAIN).DistCollective(x, nb_rank=ranks, **how)
