"""Configurations of tiny models that several folders build engines and graphs of."""

from __future__ import annotations

from dataclasses import replace

from v4export import presets
from v4export.config import FULL, REINDEX, REUSE, ModelConfig


def small(preset: str) -> ModelConfig:
    """A preset; of DeepSeek-V4.1 four layers, among which is every kind that has entries."""
    config = presets.load(preset)
    c = config.compressed
    if c is None or c.shared is None:
        return config
    shared = replace(c.shared, kv_sources=(0, 2), index_sources=(0, 2, 3), candidate_source=2)
    return replace(
        config,
        num_layers=4,
        moe_layers=(0, 1, 2, 3),
        compressed=replace(c, layers=(FULL, REUSE, FULL, REINDEX), ratios=(2, 2, 1, 1), shared=shared),
        engram=replace(config.engram, layers=(1,)),
    )
