"""The models that are measured: a billion parameters in three layouts, and three billion, float32 and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.config import FULL, REINDEX, REUSE, ModelConfig

#: Longest sequence measured, with room for the steps themselves.
MAX_SEQ_LEN = 8704
_LAYERS = 12
#: What the layouts have in common, so that what differs is attention, hyper-connections and routing.
_WIDTHS = {
    "hidden_size": 1024,
    "num_layers": _LAYERS,
    "moe_intermediate_size": 448,
    "experts_per_token": 6,
    "num_heads": 16,
    "q_lora_rank": 384,
    "vocab_size": 32000,
    "yarn": None,
    "dtype": "float32",
}


def subject(experts: int = 64) -> ModelConfig:
    """DeepSeek-V3's layout: 1.05e9 parameters with 64 experts, 0.22e9 of them at work for a token."""
    return replace(
        presets.load("tiny-v3"),
        **_WIDTHS,
        moe_layers=tuple(range(2, _LAYERS)),
        intermediate_size=2816,
        num_experts=experts,
        num_groups=8,
        topk_groups=4,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=1 << 17,
    )


def large() -> ModelConfig:
    """The same, wider and deeper: 3.0e9 parameters, 0.57e9 at work."""
    wide = {"hidden_size": 1536, "num_layers": 16, "moe_intermediate_size": 640, "intermediate_size": 4096}
    return replace(subject(), **wide, moe_layers=tuple(range(2, 16)), num_heads=24, q_lora_rank=512)


def v4() -> ModelConfig:
    """DeepSeek-V4's layout: windows, CSA and HCA, four streams, cached rows of 512 as V3's latents have."""
    flash = presets.load("deepseek-v4-flash")
    assert flash.compressed and flash.indexer
    layers = ("window", "window", *("csa", "hca") * ((_LAYERS - 2) // 2))
    attention = replace(flash.compressed, layers=layers, ratios=tuple(_RATIOS[one] for one in layers), **_OUTPUT)
    return replace(
        flash,
        **_WIDTHS | _PLAIN,
        hash_layers=(0, 1, 2),
        compressed=attention,
        indexer=replace(flash.indexer, num_heads=16),
    )


def v41() -> ModelConfig:
    """DeepSeek-V4.1's: entries of 2 and 1 tokens that layers share, and a decoder; without Engram's tables."""
    flash = presets.load("deepseek-v4.1-flash")
    assert flash.compressed and flash.compressed.shared and flash.indexer
    layers = ("window", "window", FULL, REUSE, REUSE, REUSE, FULL, REUSE, REINDEX, REUSE, REINDEX, REUSE)
    shared = replace(flash.compressed.shared, kv_sources=(2, 6), index_sources=(2, 6, 8, 10), candidate_source=6)
    ratios = (0, 0, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1)
    attention = replace(flash.compressed, layers=layers, ratios=ratios, shared=shared, **_OUTPUT)
    return replace(
        flash, **_WIDTHS | _PLAIN, compressed=attention, engram=None, indexer=replace(flash.indexer, num_heads=16)
    )


_RATIOS = {"window": 0, "csa": 4, "hca": 128}
_OUTPUT = {"o_groups": 4, "o_lora_rank": 256}
_PLAIN = {
    "num_experts": 64,
    "moe_intermediate_size": 352,
    "moe_layers": tuple(range(_LAYERS)),
    "fp8": None,
    "fp4_experts": False,
    "num_mtp_layers": 0,
    "image_token_id": None,
}

#: Folder of a checkpoint -> what the page calls it, and the model.
SUBJECTS: dict[str, tuple[str, Callable[[], ModelConfig]]] = {
    "subject": ("V3's layout, 1.05e9 parameters", subject),
    "v4": ("V4's layout, 1.0e9 parameters", v4),
    "v41": ("V4.1's layout, 1.0e9 parameters", v41),
    "large": ("V3's layout, 3.0e9 parameters", large),
}


def checkpoint(folder: Path, name: str = "subject") -> Path:
    """A subject's checkpoint in ``folder``, written unless it is there: 4 bytes a parameter."""
    path = folder / name
    return path if path.exists() else synth(SUBJECTS[name][1](), path)
