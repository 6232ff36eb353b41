"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), naive and absorbed side by side.

Per head, key = [U c | k_rope] and value = V c of the same latent c. So q_nope . (U c) = (U^T q_nope) . c: absorbing U
into the query and V into the output lets attention run on the cached latents themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.attended import Attended
from v4export.model.indexer import TokenIndexer
from v4export.model.linear import Linear
from v4export.model.norm import RMSNorm
from v4export.model.rope import rotate, rotation
from v4export.model.rows import keep
from v4export.plugins.latent_attention.op import latent_attention
from v4export.plugins.sparse_latent_attention.op import sparse_latent_attention

#: DeepSeek's own modelling code gives the two latent norms this eps whatever ``rms_norm_eps`` says.
LATENT_NORM_EPS = 1e-6


class Projected(NamedTuple):
    """What hidden states are projected to.

    Attributes:
        q_nope: queries without a position, [M, H, N].
        q_rope: rotated queries, [M, H, R].
        row_MW: rows to be cached, [latent | rotated key].
        low: what queries were projected from: their low-rank form, or the hidden states.
    """

    q_nope: Tensor
    q_rope: Tensor
    row_MW: Tensor
    low: Tensor


class LatentAttention(nn.Module):
    """The attention of one layer. ``absorbed`` picks the form; both give the same numbers.

    With an indexer (DeepSeek-V3.2), a query attends to the tokens it selects.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, absorbed: bool = True):
        super().__init__()
        c, self.config, self.absorbed = config, config, absorbed
        q_dim, bias = c.num_heads * c.qk_head_dim, c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, q_dim, dtype)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, dtype, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, dtype)
            self.q_b_proj = Linear(c.q_lora_rank, q_dim, dtype)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.latent_dim, dtype, bias=bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), dtype)
        self.indexer = TokenIndexer(config, dtype) if c.indexer else None
        self.o_proj = Linear(c.num_heads * c.v_head_dim, c.hidden_size, dtype, bias=bias)

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
            shared: ``position`` [B], tokens held by each sequence; ``cos.main`` and ``sin.main`` [1, M, R/2].
            state: ``latent`` [B, T, W], cached rows [latent | rotated key]; ``index_key`` [B, T, I] with an indexer.
            selected_MK: overrules the indexer.
        """
        position_B, parts = shared["position"], self.project(x_MD, *rotation(shared, "main"))
        new_BSW = parts.row_MW.reshape(position_B.shape[0], -1, self.config.latent_dim)
        rows, new_BSW = keep(self.config, "latent", new_BSW, shared)
        if self.indexer:
            keys, own_MK = self.indexer(x_MD, parts.low, shared, state["index_key"])
            rows = rows | keys
            selected_MK = own_MK if selected_MK is None else selected_MK
        attend = self._absorbed if self.absorbed else self._naive
        out_MHV = attend(parts, new_BSW, state["latent"], position_B, selected_MK)
        return Attended(self.output(out_MHV), rows, selected_MK)

    def project(self, x_MD: Tensor, cos: Tensor, sin: Tensor) -> Projected:
        """Queries, and the rows to be cached, of normed hidden states; cos and sin [1, M, R/2] rotate both."""
        c = self.config
        low = x_MD if c.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x_MD))
        query = self.q_proj(x_MD) if c.q_lora_rank is None else self.q_b_proj(low)
        q_nope, q_rope = query.reshape(-1, c.num_heads, c.qk_head_dim).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], -1
        )
        latent, k_rope = self._latent(x_MD)
        # The key's one head is rotated along with the queries' heads.
        rotated = rotate(torch.cat([q_rope, k_rope], 1), cos, sin)
        q_rope, k_rope = rotated.split([c.num_heads, 1], 1)
        return Projected(q_nope, q_rope, torch.cat([latent, k_rope.squeeze(1)], -1), low)

    def rows(self, x_MD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rows [M, W] alone."""
        latent, k_rope = self._latent(x_MD)
        return torch.cat([latent, rotate(k_rope, cos, sin).squeeze(1)], -1)

    def _latent(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [M, L], normed, and the key's one head [M, 1, R] before it is rotated."""
        widths = [self.config.kv_lora_rank, self.config.qk_rope_head_dim]
        latent, k_rope = self.kv_a_proj_with_mqa(x_MD).split(widths, -1)
        return self.kv_a_layernorm(latent), k_rope.unsqueeze(1)

    def output(self, out_MHV: Tensor) -> Tensor:
        """What heads return, projected to [M, D]."""
        return self.o_proj(out_MHV.reshape(-1, self.config.num_heads * self.config.v_head_dim))

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Per head, from latent to key [H, N, L] and to value [H, V, L].

        What these multiply is not rounded where linear layers round their inputs: absorbed, it is queries and mixes of
        latents, and naive attention gives the same numbers as absorbed.
        """
        c = self.config
        w = self.kv_b_proj.matrix().reshape(c.num_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        to_key, to_value = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return to_key, to_value

    def over_latents(self, parts: Projected, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """[M, H, V], the absorbed way; ``attend`` takes queries [M, H, W] to weighted latents [M, H, L]."""
        to_key, to_value = self.up_projections()
        q_latent = torch.matmul(parts.q_nope.transpose(0, 1), to_key).transpose(0, 1)
        z_MHL = attend(torch.cat([q_latent, parts.q_rope], -1))
        return torch.matmul(z_MHL.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)

    def naive(self, parts: Projected, rows_BUW: Tensor, visible_BSU: Tensor) -> Tensor:
        """[M, H, V] with keys and values of every row written out: [B, U, W], of which each query sees some."""
        c, (B, S, _) = self.config, visible_BSU.shape
        latent, k_rope = rows_BUW.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        to_key, to_value = self.up_projections()
        k_nope = torch.einsum("bul,hnl->bhun", latent, to_key)
        value = torch.einsum("bul,hvl->bhuv", latent, to_value)
        q_nope, q_rope = (q.reshape(B, S, c.num_heads, -1).transpose(1, 2) for q in (parts.q_nope, parts.q_rope))
        score_BHSU = (q_nope @ k_nope.mT + q_rope @ k_rope[:, None].mT) * c.softmax_scale
        p = score_BHSU.float().masked_fill(~visible_BSU[:, None], float("-inf")).softmax(-1).to(value.dtype)
        return (p @ value).transpose(1, 2).flatten(0, 1)

    def _absorbed(
        self, parts: Projected, new_BSW: Tensor, cache_BTW: Tensor, position_B: Tensor, selected_MK: Tensor | None
    ) -> Tensor:
        sizes = self.config.kv_lora_rank, self.config.softmax_scale

        def attend(q_MHW: Tensor) -> Tensor:
            if selected_MK is None:
                return latent_attention(q_MHW, new_BSW, cache_BTW, position_B, *sizes)
            return sparse_latent_attention(q_MHW, new_BSW, cache_BTW, selected_MK, position_B, *sizes)

        return self.over_latents(parts, attend)

    def _naive(
        self, parts: Projected, new_BSW: Tensor, cache_BTW: Tensor, position_B: Tensor, selected_MK: Tensor | None
    ) -> Tensor:
        (B, S, _), T = new_BSW.shape, cache_BTW.shape[1]
        step = torch.arange(S, device=new_BSW.device)
        held = (torch.arange(T, device=new_BSW.device) < position_B[:, None])[:, None].expand(B, S, T)
        visible = torch.cat([held, (step <= step[:, None]).expand(B, S, S)], -1)
        if selected_MK is not None:
            visible = visible & _among(selected_MK.reshape(B, S, -1), position_B, T, S)
        return self.naive(parts, torch.cat([cache_BTW, new_BSW], 1), visible)


def _among(selected_BSK: Tensor, position_B: Tensor, T: int, S: int) -> Tensor:
    """Whether each of the T cached and S new tokens is selected, [B, S, T+S]."""
    token_BU = torch.cat(
        [torch.arange(T).expand(len(position_B), T), position_B[:, None] + torch.arange(S)], 1
    )  # beyond ``position``, cached rows are another token's number, and hidden anyway
    return (token_BU[:, None, :, None] == selected_BSK[:, :, None]).any(-1)
