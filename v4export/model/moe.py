"""Feed-forward halves of a block: SwiGLU, and routed experts beside a shared one."""

from __future__ import annotations

import torch
from torch import nn

from v4export.config import Fp8Blocks, ModelConfig
from v4export.model.linear import Linear, Storage, parameter
from v4export.plugins.hash_route.op import hash_route
from v4export.plugins.moe_experts.op import FP4_BLOCK, moe_experts, swiglu
from v4export.plugins.moe_route.op import expert_scores, expert_weights, moe_route


class SwiGLU(nn.Module):
    """``down(silu(gate x) * (up x))``, the product in float32.

    Args:
        width: D.
        inner: F.
        storage: how weights are held.
        limit: gates are cut off above it, up-projections beyond it on both sides; None cuts nothing.
    """

    def __init__(self, width: int, inner: int, storage: Storage, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(width, inner, storage)
        self.up_proj = Linear(width, inner, storage)
        self.down_proj = Linear(inner, width, storage)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [M, D]."""
        return self.down_proj(swiglu(self.gate_proj(x_MD), self.up_proj(x_MD), self.limit).to(x_MD.dtype))


class Router(nn.Module):
    """Scores every expert in float32 and chooses K of them: the best, or those a table names for the token."""

    def __init__(self, config: ModelConfig, storage: Storage, hashed: bool = False):
        super().__init__()
        self.config, self.hashed = config, hashed
        self.weight = parameter(config.num_experts, config.hidden_size, dtype=storage.dtype)
        if hashed:
            self.tid2eid = parameter(config.vocab_size, config.experts_per_token, dtype=torch.int64)
        else:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)

    def logits(self, x_MD: torch.Tensor) -> torch.Tensor:
        """float32 [M, E]."""
        return nn.functional.linear(x_MD.float(), self.weight.float())

    def forward(self, x_MD: torch.Tensor, ids_BS: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights float32 [M, K] and indices int64 [M, K]; the token ids are needed where a table names the experts."""
        c = self.config
        ends = (c.norm_topk_prob, c.routed_scaling_factor)
        if self.hashed:
            assert ids_BS is not None
            return hash_route(self.logits(x_MD), self.tid2eid, ids_BS.reshape(-1), c.scoring, *ends)
        groups, group_score = {
            "greedy": ((1, 1), "max"),
            "group_limited_greedy": ((c.num_groups, c.topk_groups), "max"),
            "noaux_tc": ((c.num_groups, c.topk_groups), "top2_sum"),
        }[c.topk_method]
        bias_E = self.e_score_correction_bias
        return moe_route(self.logits(x_MD), bias_E, c.experts_per_token, c.scoring, *groups, group_score, *ends)

    def weights_of(self, logits_ME: torch.Tensor, idx_MK: torch.Tensor) -> torch.Tensor:
        """Weights float32 [M, K] of experts that somebody else chose."""
        c = self.config
        return expert_weights(expert_scores(logits_ME, c.scoring), idx_MK, c.norm_topk_prob, c.routed_scaling_factor)


class PackedLinear(nn.Module):
    """A matrix of packed E2M1 numbers, two a byte, and their multipliers."""

    def __init__(self, width: int, out: int, storage: Storage):
        super().__init__()
        self.weight = parameter(out, width // 2, dtype=torch.uint8)
        self.weight_scale_inv = parameter(out, width // FP4_BLOCK, dtype=torch.bfloat16)


class Expert(nn.Module):
    """One expert's three matrices."""

    def __init__(self, config: ModelConfig, storage: Storage):
        super().__init__()
        kind = PackedLinear if storage.fp4_experts else Linear
        self.gate_proj = kind(config.hidden_size, config.moe_intermediate_size, storage)
        self.up_proj = kind(config.hidden_size, config.moe_intermediate_size, storage)
        self.down_proj = kind(config.moe_intermediate_size, config.hidden_size, storage)


class Experts(nn.ModuleList):
    """E SwiGLU experts, each with its own three matrices, evaluated by one op."""

    def __init__(self, config: ModelConfig, count: int, storage: Storage):
        super().__init__(Expert(config, storage) for _ in range(count))
        self.block = (1, FP4_BLOCK) if storage.fp4_experts else _size(storage.fp8 or Fp8Blocks())
        self.scaled = storage.fp8 is not None or storage.fp4_experts
        self.limit = config.swiglu_limit

    def forward(self, x_MD: torch.Tensor, weights_MK: torch.Tensor, idx_MK: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [M, D]."""
        parts = [[getattr(expert, name) for expert in self] for name in ("gate_proj", "up_proj", "down_proj")]
        scales = [[p.weight_scale_inv for p in part] if self.scaled else [] for part in parts]
        stacks = [[p.weight for p in part] for part in parts]
        return moe_experts(x_MD, weights_MK, idx_MK, *stacks, *scales, *self.block, self.limit)


def _size(blocks: Fp8Blocks) -> tuple[int, int]:
    return blocks.rows, blocks.columns


class MixtureOfExperts(nn.Module):
    """Routed experts plus a shared expert that every token takes."""

    def __init__(self, config: ModelConfig, storage: Storage, experts: int, hashed: bool = False):
        super().__init__()
        self.gate = Router(config, storage, hashed)
        self.experts = Experts(config, experts, storage)
        inner = config.moe_intermediate_size * config.num_shared_experts
        limit = config.swiglu_limit
        self.shared_experts = SwiGLU(config.hidden_size, inner, storage, limit) if inner else None

    def forward(
        self, x_MD: torch.Tensor, ids_BS: torch.Tensor | None = None, chosen_MK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [M, D] and the experts taken [M, K]; ``chosen_MK`` overrules the router's choice, not its weights."""
        if chosen_MK is None:
            weights_MK, idx_MK = self.gate(x_MD, ids_BS)
        else:
            weights_MK, idx_MK = self.gate.weights_of(self.gate.logits(x_MD), chosen_MK), chosen_MK
        y_MD = self.experts(x_MD, weights_MK, idx_MK)
        return (y_MD if self.shared_experts is None else y_MD + self.shared_experts(x_MD)), idx_MK
