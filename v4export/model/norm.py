"""Norms, computed in float32 and cast at the end."""

from __future__ import annotations

import torch
from torch import nn

from v4export.model.linear import parameter


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension: x / sqrt(mean(x^2) + eps) * w."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = parameter(width, dtype=dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(nn.Module):
    """Normalisation to mean 0 and variance 1 over the last dimension, with weight and bias."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight, self.bias = parameter(width, dtype=dtype), parameter(width, dtype=dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype."""
        return nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def unit_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight; same shape and dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
