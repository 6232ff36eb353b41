"""How a sublayer is joined to what passes it by: a residual sum, or hyper-connections over several streams.

Both have the same two halves. ``enter`` gives the sublayer's input, ``leave`` takes its output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from v4export.config import HyperConnections, ModelConfig
from v4export.model.linear import parameter
from v4export.model.norm import unit_rms
from v4export.plugins.hyper_connection.op import hyper_connection
from v4export.plugins.hyper_mix.op import hyper_mix


class Residual(nn.Module):
    """x + F(x)."""

    def enter(self, x_MD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sublayer's input [M, D], and what ``leave`` needs."""
        return x_MD, ()

    def leave(self, x_MD: Tensor, y_MD: Tensor) -> Tensor:
        """[M, D]."""
        return x_MD + y_MD


class HyperConnection(nn.Module):
    """Streams collapsed for the sublayer, mixed by a doubly stochastic matrix, its output spread over all of them.

    Manifold-constrained hyper-connections (arXiv 2512.24880, section 4). All coefficients are float32.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.hyper is not None
        self.hyper, self.norm_eps = config.hyper, config.rms_norm_eps
        X, rows = config.hyper.streams, (2 + config.hyper.streams) * config.hyper.streams
        self.fn = parameter(rows, X * config.hidden_size)
        self.base = parameter(rows)
        self.scale = parameter(3)

    def enter(self, x_MXD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The sublayer's input [M, D], and what ``leave`` needs: float32 [M, X] and [M, X, X]."""
        h = self.hyper
        z_MD, post_MX, comb_MXX = hyper_connection(
            x_MXD, self.fn, self.base, self.scale, h.sinkhorn_iterations, h.eps, self.norm_eps
        )
        return z_MD, (post_MX, comb_MXX)

    def leave(self, x_MXD: Tensor, y_MD: Tensor, post_MX: Tensor, comb_MXX: Tensor) -> Tensor:
        """[M, X, D]."""
        return hyper_mix(x_MXD, y_MD, post_MX, comb_MXX)


class HyperHead(nn.Module):
    """The last collapse of the streams, before the final norm."""

    def __init__(self, config: ModelConfig, hyper: HyperConnections):
        super().__init__()
        self.eps, self.norm_eps = hyper.eps, config.rms_norm_eps
        self.hc_fn = parameter(hyper.streams, hyper.streams * config.hidden_size)
        self.hc_base = parameter(hyper.streams)
        self.hc_scale = parameter(1)

    def forward(self, x_MXD: Tensor) -> Tensor:
        """[M, D]."""
        mixes = nn.functional.linear(unit_rms(x_MXD.float().flatten(1), self.norm_eps), self.hc_fn)
        pre_MX = torch.sigmoid(mixes * self.hc_scale + self.hc_base) + self.eps
        return torch.matmul(pre_MX.unsqueeze(1), x_MXD.float()).squeeze(1).to(x_MXD.dtype)
