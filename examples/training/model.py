"""The model in plain, differentiable PyTorch: DeepSeek-V3's blocks, and Engram memory at the start of some of them.

Module names give the tensors of a state dict the names of a Hub checkpoint. Letters are the project's legend
(``docs/architecture.md``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v4export.config import Engram, ModelConfig

LATENT_NORM_EPS = 1e-6
GATE_FLOOR = 1e-6  # under the root of a gate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w over the last dimension."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def linear(width: int, out: int, scale: float = 1.0) -> nn.Linear:
    """A matrix without bias, whose output starts ``scale`` times as large as its input."""
    layer = nn.Linear(width, out, bias=False)
    nn.init.normal_(layer.weight, std=scale * width**-0.5)
    return layer


def into_stream(config: ModelConfig) -> float:
    """The scale of matrices whose output is added to the hidden states, so that all of them together add about 1."""
    return (2 * config.num_layers) ** -0.5


def rotate(x_BSHR: Tensor, theta: float, at: Tensor) -> Tensor:
    """Rotary embedding of positions ``at``, [S] or [B, S]; the pairs are channels (2j, 2j+1)."""
    R = x_BSHR.shape[-1]
    frequency = theta ** (-torch.arange(0, R, 2, dtype=torch.float32) / R)
    angle = (at[..., None].float() * frequency).unsqueeze(-2)  # one for all heads
    cos, sin = angle.cos(), angle.sin()
    even, odd = x_BSHR[..., 0::2], x_BSHR[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, section 2.1), causal over whole sequences."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.q_lora_rank and not config.yarn
        c = self.config = config
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_NORM_EPS)
        self.q_b_proj = linear(c.q_lora_rank, c.num_heads * c.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.latent_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = linear(c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(c.num_heads * c.v_head_dim, c.hidden_size, into_stream(c))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        c = self.config
        at_S = torch.arange(x_BSD.shape[1])
        query, (key, value) = self.queries(x_BSD, at_S), self.keys_and_values(x_BSD, at_S)
        value = F.pad(value, (0, c.qk_head_dim - c.v_head_dim))  # PyTorch's fast attention wants one width
        heads = (one.transpose(1, 2) for one in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=c.softmax_scale)
        return self.o_proj(out.transpose(1, 2)[..., : c.v_head_dim].flatten(-2))

    def queries(self, x_BSD: Tensor, at: Tensor) -> Tensor:
        """[B, S, H, N + R] of tokens at positions ``at``, [S] or [B, S]."""
        c = self.config
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD))).unflatten(-1, (c.num_heads, c.qk_head_dim))
        q_nope, q_rope = query.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        return torch.cat([q_nope, rotate(q_rope, c.rope_theta, at)], -1)

    def keys_and_values(self, x_BSD: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H, N + R] and [B, S, H, V], written out for every head."""
        c = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x_BSD).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        both = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (c.num_heads, -1))
        k_nope, value = both.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(2), c.rope_theta, at).expand(-1, -1, c.num_heads, -1)
        return torch.cat([k_nope, k_rope], -1), value


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)), F wide."""

    def __init__(self, config: ModelConfig, inner: int):
        super().__init__()
        width = config.hidden_size
        self.gate_proj, self.up_proj = linear(width, inner), linear(width, inner)
        self.down_proj = linear(inner, width, into_stream(config))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The K experts of each token (arXiv 2412.19437, section 2.1.2): a bias has a say in the choice, not in weights.

    ``load`` counts the tokens of each expert since it was last cleared.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert (config.num_groups, config.scoring, config.norm_topk_prob) == (1, "sigmoid", True)
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts, [M, K] each."""
        score_ME = F.linear(x_MD, self.weight).sigmoid()
        idx_MK = (score_ME + self.e_score_correction_bias).topk(self.config.experts_per_token, -1).indices
        self.load += torch.bincount(idx_MK.flatten(), minlength=len(self.load))
        score_MK = score_ME.gather(-1, idx_MK)
        return score_MK / score_MK.sum(-1, keepdim=True) * self.config.routed_scaling_factor, idx_MK

    @torch.no_grad()
    def balance(self, step: float) -> None:
        """Raises the bias of experts with fewer tokens than the mean, lowers the others', and clears ``load``."""
        self.e_score_correction_bias += step * (self.load.mean() - self.load).sign()
        self.load.zero_()


class MixtureOfExperts(nn.Module):
    """Routed experts beside a shared one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.gate = Router(c)
        self.experts = nn.ModuleList(SwiGLU(c, c.moe_intermediate_size) for _ in range(c.num_experts))
        self.shared_experts = SwiGLU(c, c.moe_intermediate_size * c.num_shared_experts)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x_MD = x_BSD.flatten(0, 1)
        weight_MK, idx_MK = self.gate(x_MD)
        order = idx_MK.flatten().argsort(stable=True)
        token = order // idx_MK.shape[1]
        counts = torch.bincount(idx_MK.flatten(), minlength=len(self.experts)).tolist()
        parts = x_MD[token].split(counts)
        routed = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        routed = routed * weight_MK.flatten()[order, None]
        return (self.shared_experts(x_MD).index_add(0, token, routed)).view_as(x_BSD)


class EngramMemory(nn.Module):
    """Engram in DeepSeek-V4.1's form with one stream: rows of a table give a gated value (arXiv 2601.07372)."""

    def __init__(self, config: ModelConfig, engram: Engram, rows: int):
        super().__init__()
        width, self.eps = config.hidden_size, config.rms_norm_eps
        self.embed = nn.Embedding(rows, engram.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.wkv = linear(engram.row_dim, 2 * width)
        self.q_weight, self.k_weight = (nn.Parameter(torch.ones(1, width)) for _ in range(2))

    def forward(self, h_BSD: Tensor, rows_BSI: Tensor) -> Tensor:
        """What is added to hidden states [B, S, D]; ``rows_BSI`` are the numbers of the rows that tokens look up."""
        key, value = self.wkv(self.embed(rows_BSI).flatten(-2)).chunk(2, -1)
        shape = (h_BSD.shape[-1],)
        query = F.rms_norm(h_BSD, shape, self.q_weight[0], self.eps)
        key = F.rms_norm(key, shape, self.k_weight[0], self.eps)
        match = (query * key).sum(-1, keepdim=True) / math.sqrt(h_BSD.shape[-1])
        return torch.copysign(match.abs().clamp_min(GATE_FLOOR).sqrt(), match).sigmoid() * value


class Block(nn.Module):
    """One layer: memory where there is one, attention, feed-forward, each added to the stream."""

    attention = LatentAttention

    def __init__(self, config: ModelConfig, layer: int, rows: int = 0):
        super().__init__()
        c = config
        self.engram = EngramMemory(c, c.engram, rows) if c.engram and rows else None
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = self.attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MixtureOfExperts(c) if c.is_moe(layer) else SwiGLU(c, c.intermediate_size)

    def forward(self, h_BSD: Tensor, rows_BSI: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.engram is not None:
            assert rows_BSI is not None
            h_BSD = h_BSD + self.engram(h_BSD, rows_BSI)
        h_BSD = h_BSD + self.self_attn(self.input_layernorm(h_BSD))
        return h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))


class Stack(nn.Module):
    """Embedding, blocks and final norm.

    Args:
        config: the model.
        rows: by layer, how many rows its Engram table has.
    """

    def __init__(self, config: ModelConfig, rows: Mapping[int, int]):
        super().__init__()
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer, rows.get(layer, 0)) for layer in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids_BS: Tensor, rows: Mapping[int, Tensor]) -> Tensor:
        """Hidden states before the final norm, [B, S, D]; ``rows`` has [B, S, hashes] for every layer with a memory."""
        h_BSD = self.embed_tokens(ids_BS)
        for layer, block in enumerate(self.layers):
            h_BSD = block(h_BSD, rows.get(layer))
        return h_BSD


class CausalLM(nn.Module):
    """The model and its head."""

    def __init__(self, config: ModelConfig, rows: Mapping[int, int] | None = None):
        super().__init__()
        self.config = config
        self.model = Stack(config, rows or {})
        self.lm_head = linear(config.hidden_size, config.vocab_size)

    def forward(self, ids_BS: Tensor, rows: Mapping[int, Tensor] | None = None) -> Tensor:
        """Logits [B, S, V]."""
        return self.logits(self.model(ids_BS, rows or {}))

    def logits(self, h_BSD: Tensor) -> Tensor:
        """[B, S, V] of hidden states before the final norm."""
        return self.lm_head(self.model.norm(h_BSD))

    def routers(self) -> list[Router]:
        """Those of all layers with experts."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def clear_loads(self) -> None:
        """Forgets which experts were busy, as after a measurement."""
        for router in self.routers():
            router.load.zero_()

    def tables(self) -> list[nn.Parameter]:
        """The Engram tables."""
        return [module.embed.weight for module in self.modules() if isinstance(module, EngramMemory)]
