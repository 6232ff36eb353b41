"""One decoder block, and the two ends of the stack."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from v4export.config import WINDOW, ModelConfig
from v4export.model.linear import IN_FLOAT32, Linear, Storage, parameter
from v4export.model.mla import LatentAttention
from v4export.model.moe import MixtureOfExperts, SwiGLU
from v4export.model.norm import RMSNorm
from v4export.model.residual import HyperConnection, HyperHead, Residual
from v4export.model.rope import angles, rotations
from v4export.model.window import WindowAttention
from v4export.state_contract import state_tensors


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden: [M, D], or [M, X, D] with hyper-connections.
        rows: new rows of each state tensor of the layer, in the contract's order.
        experts: taken, [M, K]; None in a dense layer.
        selected: tokens or entries that an indexer selected, [M, K]; None without an indexer.
    """

    hidden: torch.Tensor
    rows: tuple[torch.Tensor, ...]
    experts: torch.Tensor | None
    selected: torch.Tensor | None


class Embed(nn.Module):
    """Token ids to hidden states, and the rotations that blocks share."""

    def __init__(self, config: ModelConfig, storage: Storage = IN_FLOAT32):
        super().__init__()
        self.config = config
        table = parameter(config.vocab_size, config.hidden_size, dtype=storage.dtype)
        self.embed_tokens = nn.ParameterDict({"weight": table})

    def forward(self, ids_BS: torch.Tensor, position_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states [M, D] or [M, X, D]; cos and sin of each rotation, in ``rotations``' order."""
        hidden = nn.functional.embedding(ids_BS.reshape(-1), self.embed_tokens["weight"])
        if self.config.hyper:
            hidden = hidden.unsqueeze(1).expand(-1, self.config.hyper.streams, -1).contiguous()
        width = self.config.qk_rope_head_dim
        turned = [angles(one, width, position_B, ids_BS.shape[1]) for one in rotations(self.config).values()]
        return hidden, *(part for pair in turned for part in pair)

    def shared(self, ids_BS: torch.Tensor, position_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Hidden states, and everything else that blocks read, by name."""
        hidden, *turned = self(ids_BS, position_B)
        return hidden, dict(zip(rotation_names(self.config), turned, strict=True)) | {
            "input_ids": ids_BS,
            "position": position_B,
        }


def rotation_names(config: ModelConfig) -> list[str]:
    """What the embedding returns after the hidden states."""
    return [f"{part}.{name}" for name in rotations(config) for part in ("cos", "sin")]


def block_reads(config: ModelConfig, layer: int) -> list[str]:
    """What a block reads besides hidden states and its own state."""
    kind = config.compressed.layers[layer] if config.compressed else WINDOW
    used = ["main"] if kind == WINDOW else ["compressed", kind]
    ids = ["input_ids"] if layer in config.hash_layers else []
    return ["position", *ids, *(f"{part}.{name}" for name in used for part in ("cos", "sin"))]


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual.

    Args:
        config: the model.
        layer: index of the layer, which decides its kind.
        storage: how weights are held.
        absorbed: form of latent attention.
        experts: how many experts to hold; fewer than the router knows is enough to trace.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        storage: Storage = IN_FLOAT32,
        absorbed: bool = True,
        experts: int | None = None,
    ):
        super().__init__()
        c, dtype = config, storage.dtype
        self.state_names = [tensor.name for tensor in state_tensors(c, layer)]
        self.attn_hc = HyperConnection(c) if c.hyper else Residual()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.self_attn = WindowAttention(c, layer, storage) if c.compressed else LatentAttention(c, storage, absorbed)
        self.ffn_hc = HyperConnection(c) if c.hyper else Residual()
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.routed = c.is_moe(layer)
        self.mlp: nn.Module = (
            MixtureOfExperts(c, storage, c.num_experts if experts is None else experts, layer in c.hash_layers)
            if self.routed
            else SwiGLU(c.hidden_size, c.intermediate_size, storage, c.swiglu_limit)
        )

    def forward(
        self,
        x: torch.Tensor,
        shared: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        chosen_MK: torch.Tensor | None = None,
        selected_MK: torch.Tensor | None = None,
    ) -> BlockOutput:
        """One step of one block; ``chosen_MK`` overrules the router, ``selected_MK`` the indexer."""
        inner, passing = self.attn_hc.enter(x)
        attended = self.self_attn(self.input_layernorm(inner), shared, state, selected_MK)
        x = self.attn_hc.leave(x, attended.output, *passing)
        inner, passing = self.ffn_hc.enter(x)
        normed, idx_MK = self.post_attention_layernorm(inner), None
        if self.routed:
            y_MD, idx_MK = self.mlp(normed, shared.get("input_ids"), chosen_MK)
        else:
            y_MD = self.mlp(normed)
        rows = tuple(attended.rows[name] for name in self.state_names)
        return BlockOutput(self.ffn_hc.leave(x, y_MD, *passing), rows, idx_MK, attended.selected)


class Head(nn.Module):
    """Final norm and logits of the wanted positions."""

    def __init__(self, config: ModelConfig, storage: Storage = IN_FLOAT32):
        super().__init__()
        if config.hyper:
            self.hc_head = HyperHead(config, config.hyper)
        self.hidden_shape = config.hidden_shape
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, storage.dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, storage, plain=True)

    def forward(self, hidden: torch.Tensor, logits_at_BQ: torch.Tensor) -> torch.Tensor:
        """float32 [B, Q, V] of steps ``logits_at`` (0 .. S-1) of every sequence."""
        (B, Q), width = logits_at_BQ.shape, math.prod(self.hidden_shape)
        every_BSP = hidden.reshape(B, -1, width)
        wanted = every_BSP.gather(1, logits_at_BQ[..., None].expand(-1, -1, width)).reshape(-1, *self.hidden_shape)
        if len(self.hidden_shape) > 1:
            wanted = self.hc_head(wanted)
        logits_NV = self.lm_head(self.norm(wanted)).float()
        return logits_NV.reshape(B, Q, self.lm_head.weight.shape[0])
