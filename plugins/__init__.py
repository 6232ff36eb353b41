"""Custom ops, one folder each: torch op and eager reference, ONNX node and its portable body, CUDA kernels.

The registry below is what everything else knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import onnx_ir as ir
import torch

from v4export.plugins.fp8_rows.onnx import TRANSLATIONS as fp8_rows
from v4export.plugins.kernels import on_cuda
from v4export.plugins.round_to_fp8.onnx import TRANSLATIONS as round_to_fp8


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
        function: from a typed node, its portable body; None of one that no graph can compute by itself.
        kernels: from what runs or writes kernels and the torch op's arguments, the op's results; None of an op that
            every TensorRT has a layer of its own for.
    """

    torch_op: torch.library.CustomOpDef
    domain: str
    op_type: str
    attributes: Mapping[str, str]
    outputs: tuple[Callable[[ir.Node], ir.DataType], ...]
    translate: Callable[..., Any]
    function: Callable[[ir.Node], ir.Function] | None
    kernels: Callable[..., tuple[Any, ...]] | None


#: Folders of ops, in the order of a model's parts.
_FOLDERS = (
    "moe_route",
    "hash_route",
    "moe_experts",
    "hyper_connection",
    "hyper_coefficients",
    "hyper_mix",
    "engram_gating",
    "engram_conv",
    "latent_attention",
    "sparse_latent_attention",
    "thought_attention",
    "index_select",
    "candidate_select",
    "index_reselect",
    "window_attention",
    "compressed_attention",
    "sparse_attention",
    "compress_tokens",
    "block_dequantize",
    "int4_dequantize",
    "all_reduce",
)
_WITHOUT_KERNELS = ("block_dequantize", "int4_dequantize", "all_reduce")


def _op(folder: str) -> CustomOp:
    torch_op = getattr(import_module(f"{__name__}.{folder}.op"), folder)
    body = import_module(f"{__name__}.{folder}.onnx")
    kernels = None if folder in _WITHOUT_KERNELS else import_module(f"{__name__}.{folder}.kernel").kernels
    domain = body.DOMAIN  # that of the project, but for a name that TensorRT knows
    return CustomOp(
        torch_op, domain, body.OP_TYPE, body.ATTRIBUTES, body.OUTPUTS, body.translate, body.function, kernels
    )


OPS = tuple(_op(folder) for folder in _FOLDERS)
for _each in OPS:
    if _each.kernels is not None:
        on_cuda.register(_each.torch_op, _each.kernels)
#: Torch ops that become standard nodes, since what an exporter makes of them is refused somewhere: op -> translation.
STANDARD: dict[torch.library.CustomOpDef, Callable[..., Any]] = {**fp8_rows, **round_to_fp8}
#: The same by the node they become.
BY_NODE = {(op.domain, op.op_type): op for op in OPS}
