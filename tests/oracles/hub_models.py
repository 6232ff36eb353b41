"""transformers models of random tiny configs, and the same weights in this project's model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from v4export.config import ModelConfig
from v4export.config.readers import read_config
from v4export.model import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def yarn(**changes: Any) -> dict[str, Any]:
    """Config keys of YaRN, its unstretched range short enough for a test to leave it."""
    scaling = {
        "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    return {"rope_scaling": scaling | changes}


#: Index scores that are exactly zero tie, and transformers settles ties as it happens to: many heads make them rare.
INDEXER = {"index_n_heads": 32, "index_head_dim": 16, "index_topk": 12}

SMALL_V4: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 40,
    "o_groups": 2,
    "o_lora_rank": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 16,
    "hc_mult": 4,
    "swiglu_limit": 1.0,
    "layer_types": ["window", "csa", "hca", "csa"],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "compress_rates": {"csa": 4, "hca": 8},
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    **INDEXER,
}  # fmt: skip

#: transformers' words for kinds of layer.
KINDS = {
    "window": "sliding_attention",
    "csa": "compressed_sparse_attention",
    "hca": "heavily_compressed_attention",
}


@dataclass(frozen=True)
class Family:
    """A family's classes in transformers, and the config that tests start from."""

    config: type
    model: type
    small: dict[str, Any]


FAMILIES = {
    "deepseek_v2": Family(transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM, SMALL),
    "deepseek_v3": Family(transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, SMALL),
    "deepseek_v32": Family(transformers.DeepseekV32Config, transformers.DeepseekV32ForCausalLM, SMALL | INDEXER),
    "deepseek_v4": Family(transformers.DeepseekV4Config, transformers.DeepseekV4ForCausalLM, SMALL_V4),
}


def hub_model(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A transformers model with weights large enough that every path matters."""
    one = FAMILIES[family]
    keys = {**one.small, **changes}
    if family == "deepseek_v4":
        keys["layer_types"] = [KINDS[kind] for kind in keys["layer_types"]]
        keys["compress_rates"] = {KINDS[kind]: rate for kind, rate in keys["compress_rates"].items()}
    torch.manual_seed(seed)
    model = one.model(one.config(**copy.deepcopy(keys), attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            if "tid2eid" in name:
                every = torch.rand(len(p), model.config.n_routed_experts).argsort(-1)
                p.copy_(every[:, : p.shape[1]])
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith(("correction_bias", ".bias", "base")):
                p.copy_(0.1 * torch.randn_like(p))
            elif name.endswith("scale"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif name.endswith(("sinks", "position_bias")):
                p.copy_(torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def canonical_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in the Hub's vocabulary: experts one by one."""
    out = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            out.update({name.replace("down_proj", f"{e}.down_proj.weight"): w for e, w in enumerate(value)})
        else:
            out[name] = value
    return out


def hub_logits(model: torch.nn.Module, ids_BS: torch.Tensor) -> torch.Tensor:
    """What transformers computes in one pass without a cache, float32 [B, S, V]."""
    with torch.no_grad():
        return model(ids_BS, use_cache=False).logits


def hub_config(model: torch.nn.Module) -> ModelConfig:
    """What this project reads from the model's config.json."""
    return read_config({**model.config.to_dict(), "architectures": [type(model).__name__]})


def twin(model: torch.nn.Module, **options: Any) -> Transformer:
    """This project's model with a transformers model's weights."""
    from v4export.model.load import load_transformer

    weights = canonical_weights(model)
    return load_transformer(hub_config(model), lambda name: weights[name], **options)
