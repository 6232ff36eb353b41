"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), naive and absorbed side by side.

Per head, key = [U c | k_rope] and value = V c of the same latent c. So q_nope . (U c) = (U^T q_nope) . c: absorbing U
into the query and V into the output lets attention run on the cached latents themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.attended import Attended
from v4export.model.indexer import TokenIndexer
from v4export.model.linear import Linear, Storage
from v4export.model.norm import RMSNorm
from v4export.model.rope import rotate, rotation
from v4export.plugins.latent_attention.op import latent_attention
from v4export.plugins.sparse_latent_attention.op import sparse_latent_attention

#: DeepSeek's own modelling code gives the two latent norms this eps whatever ``rms_norm_eps`` says.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """The attention of one layer. ``absorbed`` picks the form; both give the same numbers.

    With an indexer (DeepSeek-V3.2), a query attends to the tokens it selects.
    """

    def __init__(self, config: ModelConfig, storage: Storage, absorbed: bool = True):
        super().__init__()
        c, self.config, self.absorbed = config, config, absorbed
        q_dim, bias = c.num_heads * c.qk_head_dim, c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, q_dim, storage)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, storage, bias=bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS, storage.dtype)
            self.q_b_proj = Linear(c.q_lora_rank, q_dim, storage)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.latent_dim, storage, bias=bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS, storage.dtype)
        self.kv_b_proj = Linear(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), storage)
        self.indexer = TokenIndexer(config, storage) if c.indexer else None
        self.o_proj = Linear(c.num_heads * c.v_head_dim, c.hidden_size, storage, bias=bias)

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
        c = self.config
        position_B, (cos, sin) = shared["position"], rotation(shared, "main")
        low = x_MD if c.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(x_MD))
        query = self.q_proj(x_MD) if c.q_lora_rank is None else self.q_b_proj(low)
        q_nope, q_rope = query.reshape(-1, c.num_heads, c.qk_head_dim).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], -1
        )
        latent, k_rope = self.kv_a_proj_with_mqa(x_MD).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        # The key's one head is rotated along with the queries' heads.
        rotated = rotate(torch.cat([q_rope, k_rope.unsqueeze(1)], 1), cos, sin)
        q_rope, k_rope = rotated.split([c.num_heads, 1], 1)
        row_MW = torch.cat([self.kv_a_layernorm(latent), k_rope.squeeze(1)], -1)
        new_BSW = row_MW.reshape(position_B.shape[0], -1, c.latent_dim)
        rows = {"latent": new_BSW}
        if self.indexer:
            rows["index_key"], own_MK = self.indexer(x_MD, low, shared, state["index_key"])
            selected_MK = own_MK if selected_MK is None else selected_MK
        attend = self._absorbed if self.absorbed else self._naive
        out_MHV = attend(q_nope, q_rope, new_BSW, state["latent"], position_B, selected_MK)
        return Attended(self.o_proj(out_MHV.reshape(-1, c.num_heads * c.v_head_dim)), rows, selected_MK)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Per head, from latent to key [H, N, L] and to value [H, V, L]."""
        c = self.config
        w = self.kv_b_proj.matrix().reshape(c.num_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        to_key, to_value = w.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return to_key, to_value

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, new_BSW: Tensor, cache_BTW: Tensor, position_B: Tensor,
        selected_MK: Tensor | None,
    ) -> Tensor:  # fmt: skip
        to_key, to_value = self.up_projections()
        q_latent = torch.matmul(q_nope.transpose(0, 1), to_key).transpose(0, 1)
        q_MHW = torch.cat([q_latent, q_rope], -1)
        sizes = self.config.kv_lora_rank, self.config.softmax_scale
        if selected_MK is None:
            z_MHL = latent_attention(q_MHW, new_BSW, cache_BTW, position_B, *sizes)
        else:
            z_MHL = sparse_latent_attention(q_MHW, new_BSW, cache_BTW, selected_MK, position_B, *sizes)
        return torch.matmul(z_MHL.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)

    def _naive(
        self, q_nope: Tensor, q_rope: Tensor, new_BSW: Tensor, cache_BTW: Tensor, position_B: Tensor,
        selected_MK: Tensor | None,
    ) -> Tensor:  # fmt: skip
        c = self.config
        B, S, _ = new_BSW.shape
        T = cache_BTW.shape[1]
        latent, k_rope = torch.cat([cache_BTW, new_BSW], 1).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        to_key, to_value = self.up_projections()
        k_nope = torch.einsum("bul,hnl->bhun", latent, to_key)
        value = torch.einsum("bul,hvl->bhuv", latent, to_value)
        q_nope, q_rope = (q.reshape(B, S, c.num_heads, -1).transpose(1, 2) for q in (q_nope, q_rope))
        score_BHSU = (q_nope @ k_nope.mT + q_rope @ k_rope[:, None].mT) * c.softmax_scale
        step = torch.arange(S, device=latent.device)
        held = (torch.arange(T, device=latent.device) < position_B[:, None])[:, None].expand(B, S, T)
        visible = torch.cat([held, (step <= step[:, None]).expand(B, S, S)], -1)
        if selected_MK is not None:
            visible = visible & _among(selected_MK.reshape(B, S, -1), position_B, T, S)
        p = score_BHSU.float().masked_fill(~visible[:, None], float("-inf")).softmax(-1).to(value.dtype)
        return (p @ value).transpose(1, 2).flatten(0, 1)


def _among(selected_BSK: Tensor, position_B: Tensor, T: int, S: int) -> Tensor:
    """Whether each of the T cached and S new tokens is selected, [B, S, T+S]."""
    token_BU = torch.cat(
        [torch.arange(T).expand(len(position_B), T), position_B[:, None] + torch.arange(S)], 1
    )  # beyond ``position``, cached rows are another token's number, and hidden anyway
    return (token_BU[:, None, :, None] == selected_BSK[:, :, None]).any(-1)
