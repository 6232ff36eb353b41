"""How a sublayer is joined to what passes it by: a residual sum, or hyper-connections over several streams.

Both have the same two halves. ``enter`` gives the sublayer's input, ``leave`` takes its output.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from v4export.config import HyperConnections, ModelConfig
from v4export.model.linear import parameter
from v4export.model.norm import unit_rms
from v4export.plugins.hyper_coefficients.op import hyper_coefficients
from v4export.plugins.hyper_connection.op import hyper_connection
from v4export.plugins.hyper_mix.op import hyper_mix


class Entered(NamedTuple):
    """A sublayer's input, and what passes it by.

    Attributes:
        z_MD: the input, [M, D].
        passing: what ``leave`` needs.
        pre_MX: the shares of the streams in the input of the sublayer after this one, where that goes by them.
    """

    z_MD: Tensor
    passing: tuple[Tensor, ...] = ()
    pre_MX: Tensor | None = None


class Residual(nn.Module):
    """x + F(x)."""

    def enter(self, x_MD: Tensor, pre_MX: Tensor | None = None) -> Entered:
        """The sublayer's input is what passes it by."""
        return Entered(x_MD)

    def leave(self, x_MD: Tensor, y_MD: Tensor) -> Tensor:
        """[M, D]."""
        return x_MD + y_MD


class HyperConnection(nn.Module):
    """Streams collapsed for the sublayer, mixed by a doubly stochastic matrix, its output spread over all of them.

    Manifold-constrained hyper-connections (arXiv 2512.24880, section 4). All coefficients are float32. In DeepSeek-V4.1
    a sublayer's input is collapsed by the shares that the sublayer before it computed (single-pass).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.hyper is not None
        self.hyper, self.norm_eps = config.hyper, config.rms_norm_eps
        X, rows = config.hyper.streams, (2 + config.hyper.streams) * config.hyper.streams
        self.fn = parameter(rows, X * config.hidden_size)
        self.base = parameter(rows)
        self.scale = parameter(3)

    def enter(self, x_MXD: Tensor, pre_MX: Tensor | None = None) -> Entered:
        """``passing`` is float32 [M, X] and [M, X, X]; ``pre_MX`` collapses the streams where single-pass."""
        h = self.hyper
        arguments = x_MXD, self.fn, self.base, self.scale, h.sinkhorn_iterations, h.eps, self.norm_eps
        if h.single_pass:
            assert pre_MX is not None
            next_MX, *passing = hyper_coefficients(*arguments)
            return Entered(collapse(x_MXD, pre_MX), tuple(passing), next_MX)
        z_MD, *passing = hyper_connection(*arguments)
        return Entered(z_MD, tuple(passing))

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
        return collapse(x_MXD, torch.sigmoid(mixes * self.hc_scale + self.hc_base) + self.eps)


def collapse(x_MXD: Tensor, pre_MX: Tensor) -> Tensor:
    """sum_j pre_j x_j in float32, [M, D] in the streams' dtype."""
    return torch.matmul(pre_MX.unsqueeze(1), x_MXD.float()).squeeze(1).to(x_MXD.dtype)


def first_shares(x_MXD: Tensor) -> Tensor:
    """What collapses the input of the first sublayer where single-pass: all of the first stream, float32 [M, X]."""
    return torch.eye(1, x_MXD.shape[1], device=x_MXD.device).expand(x_MXD.shape[0], -1).contiguous()
