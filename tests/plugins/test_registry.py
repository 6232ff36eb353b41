"""What holds for every custom op: one name under which all runtimes find it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from one_node import one_node
from onnxruntime.capi import onnxruntime_pybind11_state

from v4export.plugins import OPS
from v4export.plugins.function_body import OPSET, PLUGIN_HINTS

# Names that TensorRT's ONNX parser turns into layers of its own, whatever the domain.
PARSER_NAMES = {
    "TRT_MoE", "TRT_KVCacheUpdate", "TRT_Attention", "DistCollective", "TRT_BlockQuantize", "TRT_BlockDequantize",
    "TRT_DynamicQuantize", "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8QuantizeLinear",
    "TRT_MXFP8DequantizeLinear", "TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4QuantizeLinear",
    "TRT_INT4DequantizeLinear", "MoE", "QMoE", "MatMulNBits", "GroupQueryAttention", "LinearAttention",
    "CausalConvWithState", "FusedGemm",
}  # fmt: skip

F32 = np.zeros((2, 4), np.float32)
INDICES = np.zeros((2, 1), np.int64)
NODES = {
    "MoeRoute": (
        [F32, F32[0]],
        [],
        dict(outputs=2, top_k=1, scoring="sigmoid", num_groups=1, topk_groups=1, group_score="max", norm=1, scale=1.0),
    ),
    "HashRoute": ([F32, INDICES, INDICES[:, 0]], [], dict(outputs=2, scoring="sqrtsoftplus", norm=1, scale=1.0)),
    "HyperConnection": (
        [F32[:, None]],
        [np.zeros((3, 4), np.float32), F32[0, :3], F32[0, :3]],
        dict(outputs=3, num_streams=1, iterations=2, eps=1e-6, norm_eps=1e-6),
    ),
    "HyperCoefficients": (
        [F32[:, None]],
        [np.zeros((3, 4), np.float32), F32[0, :3], F32[0, :3]],
        dict(outputs=3, num_streams=1, iterations=2, eps=1e-6, norm_eps=1e-6),
    ),
    "HyperMix": ([F32[:, None], F32, F32[:, :1], F32[:, :1, None]], [], {}),
    "EngramGating": ([F32[:, None], F32[:, None], F32, F32[:1], F32[:1]], [], dict(eps=1e-20)),
    "EngramConv": ([F32[:, None], F32[:, None], np.zeros((4, 2), np.float32), INDICES[:, 0]], [], dict(dilation=1)),
    "MoeExperts": (
        [F32, F32[:, :1], INDICES],
        [np.zeros((1, 4, 4), np.float32)] * 3,
        dict(num_experts=1, rows=128, columns=128, format="", limit=0.0),
    ),
    "LatentAttention": ([F32[:, None], F32[:, None], F32[:, None], INDICES[:, 0]], [], dict(latent_width=3, scale=1.0)),
    "SparseLatentAttention": (
        [F32[:, None], F32[:, None], F32[:, None], INDICES, INDICES[:, 0]],
        [],
        dict(latent_width=3, scale=1.0),
    ),
    "ThoughtAttention": ([F32[:, None], F32[:, None], F32[:, None], INDICES], [], dict(latent_width=3, scale=1.0)),
    "IndexSelect": (
        [F32[:, None], F32[:, :1], F32[:, None], F32[:, None], INDICES[:, 0]],
        [],
        dict(top_k=1, ratio=4, scale=1.0),
    ),
    "CandidateSelect": (
        [F32[:, None], F32[:, :1], F32[:, None], F32[:, None], INDICES[:, 0]],
        [],
        dict(outputs=2, top_k=1, ratio=4, scale=1.0, top_blocks=1, block_size=2),
    ),
    "IndexReselect": (
        [F32[:, None], F32[:, :1], F32[:, None], F32[:, None], INDICES, INDICES[:, 0]],
        [],
        dict(top_k=1, ratio=4, scale=1.0, block_size=2),
    ),
    "WindowAttention": (
        [F32[:, None], F32[:, None], F32[:, None], INDICES[:, 0], F32[0, :1]],
        [],
        dict(scale=1.0),
    ),
    "CompressedAttention": (
        [F32[:, None], *[F32[:, None]] * 4, INDICES[:, 0], F32[0, :1]],
        [],
        dict(ratio=4, scale=1.0),
    ),
    "SparseAttention": (
        [F32[:, None], *[F32[:, None]] * 4, INDICES, INDICES[:, 0], F32[0, :1]],
        [],
        dict(ratio=4, scale=1.0),
    ),
    "CompressTokens": ([F32[:, None], F32[:, None], F32[:1, :2], INDICES[:, 0]], [], dict(ratio=1, halves=1)),
    "TRT_INT4DequantizeLinear": ([F32, F32[:, :1]], [], dict(domain="trt", axis=1, block_size=2)),
    "DistCollective": (
        [F32],
        [],
        dict(domain="trt", collective_operation="all_reduce", reduce_op="sum", nb_rank=2, group_size=0, root=-1),
    ),
    "TRT_BlockDequantize": ([F32, F32[:1, :1]], [], dict(domain="trt", block_shape=[128, 128], output_dtype=1)),
}


def test_every_op_is_covered_here():
    assert {op.op_type for op in OPS} == set(NODES)


def test_only_the_meant_name_is_the_parsers_own():
    """A parser that knows a name takes the node for its own operator and computes something else."""
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    names = {op.op_type for op in OPS}
    meant = {"TRT_BlockDequantize", "TRT_INT4DequantizeLinear", "DistCollective"}
    assert names & (PARSER_NAMES | standard) == meant


def test_only_one_name_is_onnxruntimes_too():
    """In a domain of its own, but a name is all that TensorRT's parser goes by once it learns one of these."""
    contrib = {schema.name for schema in onnxruntime_pybind11_state.get_all_operator_schema()}
    assert contrib & {op.op_type for op in OPS} == {"SparseAttention"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.op_type)
def test_node_and_function_agree(op):
    inputs, weights, attributes = NODES[op.op_type]
    model = one_node(op.op_type, inputs, weights, **attributes)
    (node,) = [n for n in model.graph if n.op_type == op.op_type]
    if op.function is None:
        assert set(node.attributes) == set(op.attributes) and not model.functions
        return
    function = model.functions[op.domain, op.op_type, ""]
    assert len(function.inputs) == len(node.inputs) and len(function.outputs) == len(node.outputs)
    hints = set(PLUGIN_HINTS) if op.domain == "v4" else set()
    assert set(node.attributes) == set(function.attributes) == set(op.attributes) | hints
    assert function.opset_imports[""] == OPSET
    assert all(value.name for n in function for value in n.outputs), "TensorRT refuses unnamed outputs"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.op_type)
def test_torch_name_follows_from_the_folder(op):
    folder = op.torch_op._opoverload.name().split("::")[1]
    camel = "".join(word.title() for word in folder.split("_"))
    # TensorRT's own spelling of what it widens four-bit integers with, and of what ranks do together, is another.
    others = ("TRT_INT4DequantizeLinear", "DistCollective")
    assert op.op_type in (camel, f"TRT_{camel}") or op.op_type in others
