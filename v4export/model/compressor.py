"""Compressors: every so many tokens become one cached entry (DeepSeek-V4, arXiv 2606.19348, sections 2.3.1, 2.3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.model.linear import Linear, parameter
from v4export.model.norm import RMSNorm
from v4export.model.rope import rotate_last
from v4export.plugins.compress_tokens.op import compress_tokens


class Compressor(nn.Module):
    """Pools tokens by a softmax over learned gates, channel by channel; norms and rotates the entry.

    Projections, pooling and the rows of unfinished entries are float32, as in DeepSeek's own code.

    Args:
        config: the model.
        width: of an entry.
        ratio: tokens of an entry.
        halves: 2 where an entry is also pooled from the tokens before its own, by projections of their own; else 1.
        dtype: of activations and weights.
    """

    def __init__(self, config: ModelConfig, width: int, ratio: int, halves: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.ratio, self.halves, self.dtype = width, ratio, halves, dtype
        self.kv_proj = Linear(config.hidden_size, halves * width, dtype)
        self.gate_proj = Linear(config.hidden_size, halves * width, dtype)
        self.position_bias = parameter(ratio, halves * width)
        self.kv_norm = RMSNorm(width, config.rms_norm_eps, dtype)
        #: What selects among the entries, where not all are attended to.
        self.indexer: nn.Module | None = None

    def rows(self, x_MD: Tensor, B: int) -> Tensor:
        """What is kept of each new token, [key-value | gate], float32 [B, S, 2*halves*W]."""
        return projected(x_MD, B, self.kv_proj, self.gate_proj)

    def entries(self, rows_BSP: Tensor, ring_BRP: Tensor, position_B: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The entries [B, U, W] that the step may complete, normed and rotated.

        Args:
            rows_BSP: from ``rows``.
            ring_BRP: the same of earlier tokens; token t at ``t % R``.
            position_B: tokens held by each sequence.
            cos: [1, B*U, R/2], of entries.
            sin: as ``cos``.
        """
        pooled_BUW = compress_tokens(rows_BSP, ring_BRP, self.position_bias, position_B, self.ratio, self.halves)
        return rotate_entries(self.kv_norm(pooled_BUW.to(self.dtype)), cos, sin)


def projected(x_MD: Tensor, B: int, *projections: Linear) -> Tensor:
    """Projections of each new token side by side, float32 [B, S, ...]."""
    both = torch.cat([one.in_float32(x_MD) for one in projections], -1)
    return both.reshape(B, -1, both.shape[-1])


def rotate_entries(entries_BUW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Entries [B, U, W], their last channels rotated by cos and sin [1, B*U, R/2]."""
    B, _, W = entries_BUW.shape
    return rotate_last(entries_BUW.reshape(-1, 1, W), cos, sin).reshape(B, -1, W)
