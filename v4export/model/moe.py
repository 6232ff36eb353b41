"""Feed-forward halves of a block: SwiGLU, and routed experts beside a shared one."""

from __future__ import annotations

import torch
from torch import nn

from v4export.config import ModelConfig
from v4export.model.linear import Linear, parameter
from v4export.plugins.hash_route.op import hash_route
from v4export.plugins.moe_experts.op import moe_experts, swiglu
from v4export.plugins.moe_route.op import expert_scores, expert_weights, moe_route


class SwiGLU(nn.Module):
    """``down(silu(gate x) * (up x))``, the product in float32.

    Args:
        width: D.
        inner: F.
        dtype: of activations and weights.
        limit: gates are cut off above it, up-projections beyond it on both sides; None cuts nothing.
    """

    def __init__(self, width: int, inner: int, dtype: torch.dtype, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(width, inner, dtype)
        self.up_proj = Linear(width, inner, dtype)
        self.down_proj = Linear(inner, width, dtype)

    def forward(self, x_MD: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [M, D]."""
        return self.down_proj(swiglu(self.gate_proj(x_MD), self.up_proj(x_MD), self.limit).to(x_MD.dtype))


class Router(nn.Module):
    """Scores every expert in float32 and chooses K of them: the best, or those a table names for the token."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, hashed: bool = False):
        super().__init__()
        self.config, self.hashed = config, hashed
        self.weight = parameter(config.num_experts, config.hidden_size, dtype=dtype)
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


class Expert(nn.Module):
    """One expert's three matrices."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.expert_width, dtype)
        self.up_proj = Linear(config.hidden_size, config.expert_width, dtype)
        self.down_proj = Linear(config.expert_width, config.hidden_size, dtype)


class Experts(nn.ModuleList):
    """E SwiGLU experts, each with its own three matrices, all of one format, evaluated by one op."""

    def __init__(self, config: ModelConfig, count: int, dtype: torch.dtype):
        super().__init__(Expert(config, dtype) for _ in range(count))
        self.limit = config.swiglu_limit
        self.register_parameter("input_scale", None)
        self.register_parameter("middle_scale", None)

    def round_inputs(self) -> None:
        """Round what experts multiply to FP8 from now on, by scales [E] that are uninitialised."""
        self.input_scale, self.middle_scale = parameter(len(self)), parameter(len(self))

    def forward(self, x_MD: torch.Tensor, weights_MK: torch.Tensor, idx_MK: torch.Tensor) -> torch.Tensor:
        """[M, D] -> [M, D]."""
        parts = [[getattr(expert, name) for expert in self] for name in ("gate_proj", "up_proj", "down_proj")]
        stored = parts[0][0].format
        name, block = (stored.name, stored.block) if stored.block else ("", (0, 0))
        stacks = [[p.weight for p in part] for part in parts]
        scales = [[p.weight_scale_inv for p in part] if stored.block else [] for part in parts]
        scales_2 = [[p.weight_scale_2 for p in part] if stored.outer else [] for part in parts]
        how = (name, *block, self.limit, self.input_scale, self.middle_scale)
        return moe_experts(x_MD, weights_MK, idx_MK, *stacks, *scales, *scales_2, *how)


class MixtureOfExperts(nn.Module):
    """Routed experts plus a shared expert that every token takes.

    In a model shared among ranks, what one of them adds: that of experts it does not hold is 0 times its first one's.

    Attributes:
        places: int64 [E], where each expert is among those that this rank holds, -1 for nowhere; None where it has all.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, experts: int, hashed: bool = False):
        super().__init__()
        self.gate = Router(config, dtype, hashed)
        self.experts = Experts(config, experts, dtype)
        inner, limit = config.shared_experts_width, config.swiglu_limit
        self.shared_experts = SwiGLU(config.hidden_size, inner, dtype, limit) if inner else None
        dealt_out = config.sharding is not None and config.sharding.ep > 1
        self.places = parameter(config.num_experts, dtype=torch.int64) if dealt_out else None

    def forward(
        self, x_MD: torch.Tensor, ids_BS: torch.Tensor | None = None, chosen_MK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [M, D] and the experts taken [M, K]; ``chosen_MK`` overrules the router's choice, not its weights."""
        if chosen_MK is None:
            weights_MK, idx_MK = self.gate(x_MD, ids_BS)
        else:
            weights_MK, idx_MK = self.gate.weights_of(self.gate.logits(x_MD), chosen_MK), chosen_MK
        own_MK = idx_MK
        if self.places is not None:
            places_MK = self.places[idx_MK]
            weights_MK, own_MK = weights_MK * (places_MK >= 0), places_MK.clamp(min=0)
        y_MD = self.experts(x_MD, weights_MK, own_MK)
        return (y_MD if self.shared_experts is None else y_MD + self.shared_experts(x_MD)), idx_MK
