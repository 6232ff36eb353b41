"""The models that are measured: one and three billion parameters in three layouts, float32 and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.config import FULL, REINDEX, REUSE, ModelConfig

#: Longest sequence measured, with room for the steps themselves.
MAX_SEQ_LEN = 8704
#: What the layouts have in common, so that what differs is attention, hyper-connections and routing.
_WIDTHS = {
    "hidden_size": 1024,
    "num_layers": 12,
    "moe_intermediate_size": 448,
    "experts_per_token": 6,
    "num_heads": 16,
    "q_lora_rank": 384,
    "vocab_size": 32000,
    "yarn": None,
    "dtype": "float32",
}
#: Wider and deeper: three times as many parameters.
_WIDE = {"hidden_size": 1536, "num_layers": 16, "moe_intermediate_size": 640, "num_heads": 24, "q_lora_rank": 512}
#: Experts of as many parameters in all where every layer has some.
_ALL_ROUTED = _WIDTHS | {"moe_intermediate_size": 352}
_LARGE_ALL_ROUTED = _WIDTHS | _WIDE | {"moe_intermediate_size": 544}


def subject(experts: int = 64) -> ModelConfig:
    """DeepSeek-V3's layout: 1.05e9 parameters with 64 experts, 0.22e9 of them at work for a token."""
    return replace(
        presets.load("tiny-v3"),
        **_WIDTHS,
        moe_layers=tuple(range(2, 12)),
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
    return replace(subject(), **_WIDE, moe_layers=tuple(range(2, 16)), intermediate_size=4096)


def v4() -> ModelConfig:
    """DeepSeek-V4's layout: windows, CSA and HCA, four streams, cached rows of 512 as V3's latents have."""
    return _v4(_ALL_ROUTED)


def large_v4() -> ModelConfig:
    """The same, wider and deeper: 3.0e9 parameters, 0.58e9 at work."""
    return _v4(_LARGE_ALL_ROUTED)


def v41() -> ModelConfig:
    """DeepSeek-V4.1's: entries of 2 and 1 tokens that layers share, and a decoder; without Engram's tables."""
    return _v41(_ALL_ROUTED)


def large_v41() -> ModelConfig:
    """The same, wider and deeper: 3.0e9 parameters, 0.55e9 at work."""
    return _v41(_LARGE_ALL_ROUTED)


_RATIOS = {"window": 0, "csa": 4, "hca": 128}
_OUTPUT = {"o_groups": 4, "o_lora_rank": 256}
_PLAIN = {"num_experts": 64, "fp8": None, "fp4_experts": False, "num_mtp_layers": 0, "image_token_id": None}


def _v4(widths: dict[str, Any]) -> ModelConfig:
    flash = presets.load("deepseek-v4-flash")
    assert flash.compressed and flash.indexer
    layers = ("window", "window", *("csa", "hca") * (widths["num_layers"] // 2 - 1))
    attention = replace(flash.compressed, layers=layers, ratios=tuple(_RATIOS[one] for one in layers), **_OUTPUT)
    return replace(
        flash,
        **widths | _PLAIN,
        moe_layers=tuple(range(len(layers))),
        hash_layers=(0, 1, 2),
        compressed=attention,
        indexer=replace(flash.indexer, num_heads=16),
    )


def _v41(widths: dict[str, Any]) -> ModelConfig:
    flash = presets.load("deepseek-v4.1-flash")
    assert flash.compressed and flash.compressed.shared and flash.indexer
    half = widths["num_layers"] // 2
    encoder = ("window", "window", FULL, *(REUSE,) * (half - 3))
    decoder = (FULL, REUSE, *(REINDEX, REUSE) * (half // 2 - 1))
    layers = (*encoder, *decoder)
    sources = [i for i, kind in enumerate(layers) if kind in (FULL, REINDEX)]
    shared = replace(flash.compressed.shared, kv_sources=(2, half), index_sources=tuple(sources), candidate_source=half)
    ratios = (0, 0, *(2,) * (half - 2), *(1,) * half)
    attention = replace(flash.compressed, layers=layers, ratios=ratios, shared=shared, **_OUTPUT)
    return replace(
        flash,
        **widths | _PLAIN,
        moe_layers=tuple(range(len(layers))),
        compressed=attention,
        engram=None,
        indexer=replace(flash.indexer, num_heads=16),
    )


#: Folder of a checkpoint -> what the page calls it, and the model.
SUBJECTS: dict[str, tuple[str, Callable[[], ModelConfig]]] = {
    "subject": ("V3's layout, 1.05e9 parameters", subject),
    "v4": ("V4's layout, 1.0e9 parameters", v4),
    "v41": ("V4.1's layout, 1.0e9 parameters", v41),
    "large": ("V3's layout, 3.0e9 parameters", large),
    "large-v4": ("V4's layout, 3.0e9 parameters", large_v4),
    "large-v41": ("V4.1's layout, 3.0e9 parameters", large_v41),
}


def checkpoint(folder: Path, name: str = "subject") -> Path:
    """A subject's checkpoint in ``folder``, written unless it is there: 4 bytes a parameter."""
    path = folder / name
    return path if path.exists() else synth(SUBJECTS[name][1](), path)
