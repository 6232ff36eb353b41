"""Engram: rows that hashes of the last tokens found, mixed into the hidden states (arXiv 2601.07372, section 2).

Which rows is decided by token ids alone, so they are looked up ahead of the network and enter it as activations
(``v4export/engram``); only small tables are part of it. There is a key for each stream of hyper-connections, and one
value for all: DeepSeek-V4.1 has no convolution, the paper's form adds one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4export.config import ModelConfig
from v4export.config.hashes import layouts
from v4export.model.linear import Linear, parameter
from v4export.plugins.engram_conv.op import engram_conv
from v4export.plugins.engram_gating.op import engram_gating

#: The paper's code gives the norm ahead of the convolution this eps.
CONV_NORM_EPS = 1e-5


class Table(nn.Module):
    """A table that is part of the network."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(rows, width, dtype=dtype)

    def forward(self, rows_BSK: Tensor) -> Tensor:
        """[B, S, K] numbers of rows -> [B, S, K * width]."""
        return nn.functional.embedding(rows_BSK, self.weight).flatten(2)


class Convolution(nn.Module):
    """A depthwise causal convolution of what the gates let through, each stream normed by itself."""

    def __init__(self, config: ModelConfig, streams: int, dtype: torch.dtype):
        super().__init__()
        assert config.engram is not None
        self.dilation = config.engram.dilation
        self.weight = parameter(streams * config.hidden_size, config.engram.kernel, dtype=dtype)
        self.norm = parameter(streams, config.hidden_size, dtype=dtype)

    def forward(self, u_MXD: Tensor, ring_BRP: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to u, [M, X, D]; and the rows of the new tokens [B, S, X*D], which later ones need."""
        normed_MXD = nn.functional.rms_norm(u_MXD.float(), u_MXD.shape[-1:], eps=CONV_NORM_EPS) * self.norm.float()
        rows_BSP = normed_MXD.to(u_MXD.dtype).reshape(position_B.shape[0], -1, self.weight.shape[0])
        return engram_conv(rows_BSP, ring_BRP, self.weight, position_B, self.dilation).reshape(u_MXD.shape), rows_BSP


class EngramMemory(nn.Module):
    """What a layer's look-up adds to its hidden states."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        e = config.engram
        assert e is not None
        self.streams = config.hyper.streams if config.hyper else 1
        self.width, self.eps = config.hidden_size, config.rms_norm_eps
        self.embed = Table(layouts(e)[layer].rows, e.width, dtype) if e.inside else None
        self.wkv = Linear(e.row_dim, (self.streams + 1) * config.hidden_size, dtype)
        self.q_weight = parameter(self.streams, config.hidden_size, dtype=dtype)
        self.k_weight = parameter(self.streams, config.hidden_size, dtype=dtype)
        self.conv = Convolution(config, self.streams, dtype) if e.kernel else None

    def forward(
        self, x: Tensor, found_BSP: Tensor, position_B: Tensor, ring_BRP: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The hidden states with the memory added, and new rows of the layer's state.

        Args:
            x: [M, D] or [M, X, D].
            found_BSP: the rows found for each token, side by side; their numbers where the table is inside.
            position_B: tokens held.
            ring_BRP: rows of earlier tokens, where there is a convolution.
        """
        found_BSP = self.embed(found_BSP) if self.embed else found_BSP
        x_MXD = x.reshape(-1, self.streams, self.width)
        both = self.wkv(found_BSP.flatten(0, 1))
        keys, value_MD = both.split([self.streams * self.width, self.width], -1)
        u_MXD = engram_gating(
            x_MXD, keys.reshape(-1, self.streams, self.width), value_MD, self.q_weight, self.k_weight, self.eps
        )
        if self.conv is None:
            return (x_MXD + u_MXD).reshape(x.shape), {}
        assert ring_BRP is not None
        more_MXD, rows_BSP = self.conv(u_MXD, ring_BRP, position_B)
        return (x_MXD + u_MXD + more_MXD).reshape(x.shape), {"engram": rows_BSP}
