"""DeepSeek-V4's attention: a sliding window, and entries that stand for the tokens before it (arXiv 2606.19348, 2.3).

There is one key for all heads, which is also the value. Its last channels are rotated, so those of the result are
rotated back by the query's position. A sink for each head enlarges the softmax's denominator and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from v4export.config import CSA, WINDOW, ModelConfig
from v4export.model.compressor import Compressor
from v4export.model.indexer import EntryIndexer
from v4export.model.linear import Linear, Storage, parameter
from v4export.model.mla import Attended
from v4export.model.norm import RMSNorm, unit_rms
from v4export.model.rope import rotate_last, rotation
from v4export.plugins.compressed_attention.op import compressed_attention
from v4export.plugins.sparse_attention.op import sparse_attention
from v4export.plugins.window_attention.op import window_attention


class WindowAttention(nn.Module):
    """The attention of one layer of any of the three kinds."""

    def __init__(self, config: ModelConfig, layer: int, storage: Storage):
        super().__init__()
        c = config.compressed
        assert c is not None and config.q_lora_rank is not None
        self.config, self.kind, self.width = config, c.layers[layer], c.head_dim
        heads, eps, dtype = config.num_heads, config.rms_norm_eps, storage.dtype
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, storage)
        self.q_a_norm = RMSNorm(config.q_lora_rank, eps, dtype)
        self.q_b_proj = Linear(config.q_lora_rank, heads * c.head_dim, storage)
        self.kv_proj = Linear(config.hidden_size, c.head_dim, storage)
        self.kv_norm = RMSNorm(c.head_dim, eps, dtype)
        self.sinks = parameter(heads)
        if self.kind != WINDOW:
            self.compressor = Compressor(config, c.head_dim, c.ratio(self.kind), 2 if self.kind == CSA else 1, storage)
        if self.kind == CSA:
            self.compressor.indexer = EntryIndexer(config, storage)
        self.o_groups = c.o_groups
        self.o_a_proj = Linear(heads * c.head_dim // c.o_groups, c.o_groups * c.o_lora_rank, storage)
        self.o_b_proj = Linear(c.o_groups * c.o_lora_rank, config.hidden_size, storage)

    def forward(
        self,
        x_MD: Tensor,
        shared: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        selected_MK: Tensor | None = None,
    ) -> Attended:
        """One step.

        Args:
            x_MD: normed hidden states of the B*S new tokens.
            shared: ``position`` [B], and the rotations (``cos.*``, ``sin.*``) that the layer's kind uses.
            state: the layer's tensors, by name.
            selected_MK: overrules the indexer of a CSA layer.
        """
        position_B = shared["position"]
        B = position_B.shape[0]
        cos, sin = rotation(shared, "main" if self.kind == WINDOW else "compressed")
        low_MQ = self.q_a_norm(self.q_a_proj(x_MD))
        q_MHW = self.q_b_proj(low_MQ).reshape(-1, self.config.num_heads, self.width)
        q_MHW = rotate_last(unit_rms(q_MHW, self.config.rms_norm_eps), cos, sin)
        new_BSW = rotate_last(self.kv_norm(self.kv_proj(x_MD)).unsqueeze(1), cos, sin).reshape(B, -1, self.width)
        rows = {"window": new_BSW}
        window, rest = (q_MHW, new_BSW, state["window"]), (position_B, self.sinks)
        scale = self.config.softmax_scale
        if self.kind == WINDOW:
            z_MHW = window_attention(*window, *rest, scale)
            return Attended(self._output(rotate_last(z_MHW, cos, -sin)), rows)
        compressor = self.compressor
        rows["open"] = compressor.rows(x_MD, B)
        rows["entry"] = compressor.entries(rows["open"], state["open"], position_B, *rotation(shared, self.kind))
        entries = (rows["entry"], state["entry"])
        if compressor.indexer:
            rows["index_key"], rows["index_open"], own_MK = compressor.indexer(
                x_MD, low_MQ, shared, state["index_key"], state["index_open"]
            )
            selected_MK = own_MK if selected_MK is None else selected_MK
            z_MHW = sparse_attention(*window, *entries, selected_MK, *rest, compressor.ratio, scale)
        else:
            z_MHW = compressed_attention(*window, *entries, *rest, compressor.ratio, scale)
        return Attended(self._output(rotate_last(z_MHW, cos, -sin)), rows, selected_MK)

    def _output(self, z_MHW: Tensor) -> Tensor:
        """[M, H, W] -> [M, D]: heads in groups, each with a low-rank projection of its own, then one for all."""
        groups = self.o_groups
        z_GMP = z_MHW.reshape(-1, groups, z_MHW.shape[1] // groups * self.width).transpose(0, 1)
        w_GPR = self.o_a_proj.matrix().reshape(groups, -1, z_GMP.shape[-1]).transpose(1, 2)
        low = torch.matmul(z_GMP, w_GPR).transpose(0, 1)
        return self.o_b_proj(low.reshape(-1, groups * w_GPR.shape[-1]))
