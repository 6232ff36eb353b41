"""Lightning indexers: cheap scores that say which few tokens, or compressed entries, a query attends to.

``score[i, t] = sum_h w[i, h] * relu(q[i, h] . k[t])``, both factors scaled (DeepSeek-V3.2, arXiv 2512.02556, eq. 1).
The reference implementation turns q and k by the same Hadamard matrix before it quantises them, which changes no
product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.compressor import Compressor
from v4export.model.linear import Linear
from v4export.model.norm import LayerNorm
from v4export.model.rope import entry_rotation, rotate_first, rotate_last, rotation
from v4export.model.rows import keep
from v4export.plugins.index_select.op import index_select

#: DeepSeek's own modelling code gives the key's norm this eps whatever ``rms_norm_eps`` says.
KEY_NORM_EPS = 1e-6


class TokenIndexer(nn.Module):
    """DeepSeek-V3.2's: one key a token, rotated on its first channels in half-split layout."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        index = config.indexer
        assert index is not None and config.q_lora_rank is not None
        self.config, self.index = config, index
        self.wq_b = Linear(config.q_lora_rank, index.num_heads * index.head_dim, dtype)
        self.wk = Linear(config.hidden_size, index.head_dim, dtype)
        self.k_norm = LayerNorm(index.head_dim, KEY_NORM_EPS, dtype)
        self.weights_proj = Linear(config.hidden_size, index.num_heads, dtype)

    def forward(
        self, x_MD: Tensor, low_MQ: Tensor, shared: Mapping[str, Tensor], cache_BTI: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept of new keys [B, S, I], and the selected tokens int64 [M, K], -1 where fewer can be seen.

        Args:
            x_MD: normed hidden states.
            low_MQ: normed low-rank queries.
            shared: ``position``, and the rotation of tokens (``main``).
            cache_BTI: keys of the tokens held.
        """
        index, position_B = self.index, shared["position"]
        cos, sin = rotation(shared, "main")
        q_MHI = rotate_first(self.wq_b(low_MQ).reshape(-1, index.num_heads, index.head_dim), cos, sin)
        k_MI = rotate_first(self.k_norm(self.wk(x_MD)).unsqueeze(1), cos, sin).squeeze(1)
        keys = keep(self.config, "index_key", k_MI.reshape(position_B.shape[0], -1, index.head_dim), shared)
        weights_MH = self.weights_proj(x_MD).float()
        scale = (index.num_heads * index.head_dim) ** -0.5
        return keys.tensors, index_select(q_MHI, weights_MH, keys.read, cache_BTI, position_B, index.top_k, 1, scale)


class Scorer(nn.Module):
    """The weight of each index head, named as the Hub names it."""

    def __init__(self, config: ModelConfig, heads: int, dtype: torch.dtype):
        super().__init__()
        self.weights_proj = Linear(config.hidden_size, heads, dtype)


class EntryIndexer(Compressor):
    """DeepSeek-V4's: keys are compressed as entries are, and rotated on their last channels as entries are."""

    def __init__(self, config: ModelConfig, ratio: int, dtype: torch.dtype):
        index = config.indexer
        assert index is not None and config.q_lora_rank is not None
        super().__init__(config, index.head_dim, ratio, 2, dtype)
        self.config, self.index = config, index
        self.q_b_proj = Linear(config.q_lora_rank, index.num_heads * index.head_dim, dtype)
        self.scorer = Scorer(config, index.num_heads, dtype)

    def forward(
        self,
        x_MD: Tensor,
        low_MQ: Tensor,
        shared: Mapping[str, Tensor],
        cache_BCI: Tensor,
        ring_BRP: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept of new keys [B, U, I] and of unfinished ones [B, S, P]; the selected entries int64 [M, K] or -1.

        Args:
            x_MD: normed hidden states.
            low_MQ: normed low-rank queries.
            shared: ``position``, and the rotations of tokens and of entries.
            cache_BCI: keys of the entries held.
            ring_BRP: rows of earlier tokens.
        """
        index, position_B = self.index, shared["position"]
        rows_BSP = self.rows(x_MD, position_B.shape[0])
        new_BUI = self.entries(rows_BSP, ring_BRP, position_B, *rotation(shared, entry_rotation(self.ratio)))
        keys = keep(self.config, "index_key", new_BUI, shared)
        q_MHI = self.q_b_proj(low_MQ).reshape(-1, index.num_heads, index.head_dim)
        q_MHI = rotate_last(q_MHI, *rotation(shared, "compressed"))
        weights_MH = self.scorer.weights_proj(x_MD).float()
        scale = (index.num_heads * index.head_dim) ** -0.5
        selected_MK = index_select(q_MHI, weights_MH, keys.read, cache_BCI, position_B, index.top_k, self.ratio, scale)
        return keys.tensors | {"index_open": rows_BSP}, selected_MK
