"""Rotary position embedding with YaRN: which rotations a model has, and how they are applied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.onnx import ops as onnx_ops

from v4export.config import ModelConfig, Yarn


@dataclass(frozen=True)
class Rotation:
    """One family of rotations.

    Attributes:
        theta: base of the frequencies.
        yarn: scaling of the frequencies.
        every: tokens that a rotated row stands for; the row's position is that of its first token.
        magnitude: what cos and sin are multiplied by.
    """

    theta: float
    yarn: Yarn | None
    every: int = 1
    magnitude: float = 1.0

    def frequencies(self, width: int) -> torch.Tensor:
        """Angle per position of each channel pair, float32 [R/2] (YaRN, arXiv 2309.00071, section 3.2)."""
        pair = torch.arange(0, width, 2, dtype=torch.float32) / width
        plain = 1.0 / self.theta**pair
        if self.yarn is None:
            return plain
        low, high = _ramp_bounds(self.yarn, width, self.theta)
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return plain / self.yarn.factor * ramp + plain * (1 - ramp)


def rotations(config: ModelConfig) -> dict[str, Rotation]:
    """The rotations of a model, by name.

    ``main`` turns tokens; in compressed attention only those of window layers. ``compressed`` turns the tokens of
    layers with entries, and others the entries themselves. DeepSeek-V4 uses YaRN's frequencies without its magnitudes.
    """
    c = config.compressed
    if c is None:
        magnitude = config.yarn.rotary_magnitude if config.yarn else 1.0
        return {"main": Rotation(config.rope_theta, config.yarn, magnitude=magnitude)}
    found = {"main": Rotation(config.rope_theta, None)} if 0 in c.ratios else {}
    for ratio in sorted({1, *c.ratios} - {0} if any(c.ratios) else ()):
        found[entry_rotation(ratio)] = Rotation(c.rope_theta, config.yarn, ratio)
    return found


def token_rotation(config: ModelConfig, layer: int) -> str:
    """Name of the rotation of a layer's tokens."""
    return "compressed" if config.compressed and config.compressed.ratios[layer] else "main"


def entry_rotation(ratio: int) -> str:
    """Name of the rotation of entries that stand for so many tokens."""
    return "compressed" if ratio == 1 else f"compressed.{ratio}"


def angles(rotation: Rotation, width: int, position_B: torch.Tensor, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [1, B*U, R/2], of the U rows that the step's S tokens may complete (of tokens: U = S)."""
    at_BU = position_B[:, None] + torch.arange(S, device=position_B.device)
    if rotation.every > 1:
        first = torch.arange((S + rotation.every - 1) // rotation.every, device=position_B.device)
        at_BU = (position_B[:, None] // rotation.every + first) * rotation.every
    angle = at_BU.reshape(1, -1, 1).float() * rotation.frequencies(width).to(position_B.device)
    return angle.cos() * rotation.magnitude, angle.sin() * rotation.magnitude


def rotation(shared: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one of ``rotations``, from what blocks share."""
    return shared[f"cos.{name}"], shared[f"sin.{name}"]


def _ramp_bounds(yarn: Yarn, width: int, theta: float) -> tuple[float, float]:
    """Between which pairs the frequencies pass from unstretched to stretched."""

    def pair_turning(turns: float) -> float:
        return width * math.log(yarn.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), width - 1)
    # Kimi-K2 has beta_fast == beta_slow, which can make the ramp a step.
    return low, high + 0.001 if low == high else high


def rotate(x_MHR: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = True) -> torch.Tensor:
    """Rotate the pairs (2j, 2j+1) of [M, H, R], or (j, j+R/2) where not ``interleaved``; float32 inside."""
    _, H, R = x_MHR.shape
    flat = x_MHR.reshape(1, -1, H * R).float()
    turned = onnx_ops.rotary_embedding(flat, cos, sin, interleaved=interleaved, num_heads=H)
    return turned.reshape(-1, H, R).to(x_MHR.dtype)


def rotate_last(x_MHW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last R channels of [M, H, W], where cos and sin are [1, M, R/2]."""
    R = 2 * cos.shape[-1]
    still, turning = x_MHW.split([x_MHW.shape[-1] - R, R], -1)
    return torch.cat([still, rotate(turning, cos, sin)], -1)


def rotate_first(x_MHW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R channels of [M, H, W] in half-split layout, where cos and sin are [1, M, R/2]."""
    R = 2 * cos.shape[-1]
    turning, still = x_MHW.split([R, x_MHW.shape[-1] - R], -1)
    return torch.cat([rotate(turning, cos, sin, interleaved=False), still], -1)
