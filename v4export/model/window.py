"""DeepSeek-V4's attention: a sliding window, and entries that stand for the tokens before it (arXiv 2606.19348, 2.3).

There is one key for all heads, which is also the value. Its last channels are rotated, so those of the result are
rotated back by the query's position. A sink for each head enlarges the softmax's denominator and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from v4export.config import CSA, ModelConfig
from v4export.model.attended import Attended
from v4export.model.compressor import Compressor
from v4export.model.indexer import EntryIndexer
from v4export.model.linear import Linear, parameter
from v4export.model.norm import RMSNorm, unit_rms
from v4export.model.rope import entry_rotation, rotate_last, rotation, token_rotation
from v4export.model.rows import keep
from v4export.plugins.compressed_attention.op import compressed_attention
from v4export.plugins.sparse_attention.op import sparse_attention
from v4export.plugins.window_attention.op import window_attention


class Window(NamedTuple):
    """What attention to the newest tokens works on.

    Attributes:
        low_MQ: normed low-rank queries, which indexers read as well.
        q_MHW: rotated queries.
        new_BSW: rows of the new tokens.
        kept: what is kept of them, by the state's names.
    """

    low_MQ: Tensor
    q_MHW: Tensor
    new_BSW: Tensor
    kept: dict[str, Tensor]


class WindowAttention(nn.Module):
    """The attention of a layer without entries, and what those with entries have in common with it."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        c = config.compressed
        assert c is not None and config.q_lora_rank is not None
        self.config, self.layer, self.width = config, layer, c.head_dim
        heads, eps = config.num_heads, config.rms_norm_eps
        self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, dtype)
        self.q_a_norm = RMSNorm(config.q_lora_rank, eps, dtype)
        self.q_b_proj = Linear(config.q_lora_rank, heads * c.head_dim, dtype)
        self.kv_proj = Linear(config.hidden_size, c.head_dim, dtype)
        self.kv_norm = RMSNorm(c.head_dim, eps, dtype)
        self.sinks = parameter(heads)
        self.norm_queries = c.norm_queries
        self.o_groups = c.o_groups
        self.o_a_proj = Linear(heads * c.head_dim // c.o_groups, c.o_groups * c.o_lora_rank, dtype)
        self.o_b_proj = Linear(c.o_groups * c.o_lora_rank, config.hidden_size, dtype)

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
            shared: ``position`` [B], the rotations (``cos.*``, ``sin.*``) that the layer uses, and what layers before
                it share with it.
            state: the layer's tensors, by name.
            selected_MK: overrules the layer's indexer.
        """
        window = self.window(x_MD, shared)
        rest = (shared["position"], self.sinks, self.config.softmax_scale, self.since(shared))
        z_MHW = window_attention(window.q_MHW, window.new_BSW, state["window"], *rest)
        return Attended(self.output(z_MHW, shared), window.kept)

    def window(self, x_MD: Tensor, shared: Mapping[str, Tensor]) -> Window:
        """Queries, and the new tokens' rows."""
        cos, sin = self.token_turn(shared)
        low_MQ = self.q_a_norm(self.q_a_proj(x_MD))
        q_MHW = self.q_b_proj(low_MQ).reshape(-1, self.config.num_heads, self.width)
        if self.norm_queries:
            q_MHW = unit_rms(q_MHW, self.config.rms_norm_eps)
        new_MHW = rotate_last(self.kv_norm(self.kv_proj(x_MD)).unsqueeze(1), cos, sin)
        kept = keep(self.config, "window", new_MHW.reshape(shared["position"].shape[0], -1, self.width), shared)
        return Window(low_MQ, rotate_last(q_MHW, cos, sin), kept.read, kept.tensors)

    def since(self, shared: Mapping[str, Tensor]) -> Tensor | None:
        """The first token that has passed this layer, [B]; None in a model whose every token passes every layer."""
        c = self.config.compressed
        if c is None or c.shared is None:
            return None
        position_B = shared["position"]
        return shared["decoder_start"] if self.config.is_decoder(self.layer) else torch.zeros_like(position_B)

    def token_turn(self, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin of the new tokens."""
        return rotation(shared, token_rotation(self.config, self.layer))

    def output(self, z_MHW: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """[M, H, W] -> [M, D]: rotated back; heads in groups, each with a low-rank projection, then one for all."""
        cos, sin = self.token_turn(shared)
        turned_MHW = rotate_last(z_MHW, cos, -sin)
        groups = self.o_groups
        z_GMP = turned_MHW.reshape(-1, groups, z_MHW.shape[1] // groups * self.width).transpose(0, 1)
        # A product for each group, whose inputs are not rounded where linear layers round theirs.
        w_GPR = self.o_a_proj.matrix().reshape(groups, -1, z_GMP.shape[-1]).transpose(1, 2)
        low = torch.matmul(z_GMP, w_GPR).transpose(0, 1)
        return self.o_b_proj(low.reshape(-1, groups * w_GPR.shape[-1]))


class EntryAttention(WindowAttention):
    """Beside the window, entries that the layer makes itself: all of few, or those that its indexer selects."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__(config, layer, dtype)
        c = config.compressed
        assert c is not None
        selects = c.layers[layer] == CSA
        self.compressor = Compressor(config, c.head_dim, c.ratios[layer], 2 if selects else 1, dtype)
        if selects:
            self.compressor.indexer = EntryIndexer(config, c.ratios[layer], dtype)

    def forward(
        self,
        x_MD: Tensor,
        shared: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        selected_MK: Tensor | None = None,
    ) -> Attended:
        """As ``WindowAttention.forward``."""
        compressor, position_B = self.compressor, shared["position"]
        window, turn = self.window(x_MD, shared), rotation(shared, entry_rotation(compressor.ratio))
        open_BSP = compressor.rows(x_MD, position_B.shape[0])
        new_BUW = compressor.entries(open_BSP, state["open"], position_B, *turn)
        entries = keep(self.config, "entry", new_BUW, shared)
        rows = window.kept | {"open": open_BSP} | entries.tensors
        keys = (window.q_MHW, window.new_BSW, state["window"], entries.read, state["entry"])
        rest = (position_B, self.sinks, compressor.ratio, self.config.softmax_scale)
        if compressor.indexer:
            held = state["index_key"], state["index_open"]
            index_rows, own_MK = compressor.indexer(x_MD, window.low_MQ, shared, *held)
            rows |= index_rows
            selected_MK = own_MK if selected_MK is None else selected_MK
            z_MHW = sparse_attention(*keys, selected_MK, *rest)
        else:
            z_MHW = compressed_attention(*keys, *rest)
        return Attended(self.output(z_MHW, shared), rows, selected_MK)
