"""Custom ops, one folder each: torch op and eager reference, ONNX node and its portable body.

The registry below is what the tracer and the stamper know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from v4export.plugins.block_dequantize import onnx as block_dequantize_onnx
from v4export.plugins.block_dequantize.op import block_dequantize
from v4export.plugins.candidate_select import onnx as candidate_select_onnx
from v4export.plugins.candidate_select.op import candidate_select
from v4export.plugins.compress_tokens import onnx as compress_tokens_onnx
from v4export.plugins.compress_tokens.op import compress_tokens
from v4export.plugins.compressed_attention import onnx as compressed_attention_onnx
from v4export.plugins.compressed_attention.op import compressed_attention
from v4export.plugins.engram_conv import onnx as engram_conv_onnx
from v4export.plugins.engram_conv.op import engram_conv
from v4export.plugins.engram_gating import onnx as engram_gating_onnx
from v4export.plugins.engram_gating.op import engram_gating
from v4export.plugins.function_body import DOMAIN
from v4export.plugins.hash_route import onnx as hash_route_onnx
from v4export.plugins.hash_route.op import hash_route
from v4export.plugins.hyper_coefficients import onnx as hyper_coefficients_onnx
from v4export.plugins.hyper_coefficients.op import hyper_coefficients
from v4export.plugins.hyper_connection import onnx as hyper_connection_onnx
from v4export.plugins.hyper_connection.op import hyper_connection
from v4export.plugins.hyper_mix import onnx as hyper_mix_onnx
from v4export.plugins.hyper_mix.op import hyper_mix
from v4export.plugins.index_reselect import onnx as index_reselect_onnx
from v4export.plugins.index_reselect.op import index_reselect
from v4export.plugins.index_select import onnx as index_select_onnx
from v4export.plugins.index_select.op import index_select
from v4export.plugins.latent_attention import onnx as latent_attention_onnx
from v4export.plugins.latent_attention.op import latent_attention
from v4export.plugins.moe_experts import onnx as moe_experts_onnx
from v4export.plugins.moe_experts.op import moe_experts
from v4export.plugins.moe_route import onnx as moe_route_onnx
from v4export.plugins.moe_route.op import moe_route
from v4export.plugins.sparse_attention import onnx as sparse_attention_onnx
from v4export.plugins.sparse_attention.op import sparse_attention
from v4export.plugins.sparse_latent_attention import onnx as sparse_latent_attention_onnx
from v4export.plugins.sparse_latent_attention.op import sparse_latent_attention
from v4export.plugins.thought_attention import onnx as thought_attention_onnx
from v4export.plugins.thought_attention.op import thought_attention
from v4export.plugins.window_attention import onnx as window_attention_onnx
from v4export.plugins.window_attention.op import window_attention


@dataclass(frozen=True)
class CustomOp:
    """One op under its three names.

    Attributes:
        torch_op: the torch.library op.
        domain: domain of the ONNX node.
        op_type: type of the ONNX node.
        attributes: the node's own attributes and their ONNX types, without the plugin hints.
        outputs: for each output, from a node to its dtype.
        translate: from the torch op's arguments to the node, called by torch.onnx.
        function: from a typed node, its portable body.
    """

    torch_op: torch.library.CustomOpDef
    domain: str
    op_type: str
    attributes: Mapping[str, str]
    outputs: tuple[Callable[[ir.Node], ir.DataType], ...]
    translate: Callable[..., Any]
    function: Callable[[ir.Node], ir.Function]


OPS = tuple(
    CustomOp(op, domain, body.OP_TYPE, body.ATTRIBUTES, body.OUTPUTS, body.translate, body.function)
    for op, domain, body in (
        (moe_route, DOMAIN, moe_route_onnx),
        (hash_route, DOMAIN, hash_route_onnx),
        (moe_experts, DOMAIN, moe_experts_onnx),
        (hyper_connection, DOMAIN, hyper_connection_onnx),
        (hyper_coefficients, DOMAIN, hyper_coefficients_onnx),
        (hyper_mix, DOMAIN, hyper_mix_onnx),
        (engram_gating, DOMAIN, engram_gating_onnx),
        (engram_conv, DOMAIN, engram_conv_onnx),
        (latent_attention, DOMAIN, latent_attention_onnx),
        (sparse_latent_attention, DOMAIN, sparse_latent_attention_onnx),
        (thought_attention, DOMAIN, thought_attention_onnx),
        (index_select, DOMAIN, index_select_onnx),
        (candidate_select, DOMAIN, candidate_select_onnx),
        (index_reselect, DOMAIN, index_reselect_onnx),
        (window_attention, DOMAIN, window_attention_onnx),
        (compressed_attention, DOMAIN, compressed_attention_onnx),
        (sparse_attention, DOMAIN, sparse_attention_onnx),
        (compress_tokens, DOMAIN, compress_tokens_onnx),
        (block_dequantize, block_dequantize_onnx.DOMAIN, block_dequantize_onnx),
    )
)

#: The same by the node they become.
BY_NODE = {(op.domain, op.op_type): op for op in OPS}
