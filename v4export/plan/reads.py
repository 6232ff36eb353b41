"""Bytes that one decoded token reads, as what runs it holds weights and cached rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.imagined import imagined
from v4export.checkpoint.names import drafter_prefix
from v4export.config import ModelConfig
from v4export.graphs.repacked import BITS, COLUMNS
from v4export.plan.loads import rows_read
from v4export.plan.weights import weight_bytes
from v4export.precision import PLAIN, Precision

_FLOAT32 = 4


@dataclass(frozen=True)
class Reads:
    """Of one token of one sequence, without a thought or a draft.

    Attributes:
        weights: bytes of the matrices that it is multiplied with, K of E experts among them.
        state: bytes of cached rows that attention reads.
    """

    weights: float
    state: float

    @property
    def total(self) -> float:
        """Of both."""
        return self.weights + self.state


def reads(config: ModelConfig, precision: Precision, context: int, *, widened: bool, repacked: bool) -> Reads:
    """What a token reads behind ``context`` cached ones.

    Args:
        config: the model.
        precision: its recipe.
        context: cached tokens.
        widened: whether onnxruntime's own kernels run it on a CPU, for which matrices are widened when a graph is
            loaded; else they are read as they are stored.
        repacked: whether integer matrices were written once more for those kernels.
    """
    weights = imagined(config)
    # What thinks and what drafts are graphs of their own.
    apart = ("model.reasoning.", *((drafter_prefix(config),) if config.drafts else ()))
    looked_up = ("engram_table", "hash_table", *(() if config.tie_word_embeddings else ("embedding",)))
    stored = weight_bytes(weights, config, precision, cpu_weights=False).each
    total = 0.0
    for name, nbytes in stored.items():
        weight = weights.get(name)
        if weight is None or weight.name.startswith(apart) or weight.role in looked_up:
            continue
        share = config.experts_per_token / config.num_experts if weight.role == "expert" else 1.0
        total += share * (_widened(weight, precision, nbytes, repacked) if widened else nbytes)
    itemsize = PLAIN[precision.activations].bits // 8
    layers = range(config.num_layers)
    rows = sum(count * size for i in layers for count, size, *_ in rows_read(config, i, context, itemsize))
    return Reads(total, rows)


def _widened(weight: Weight, precision: Precision, stored: int, repacked: bool) -> float:
    """Bytes of a weight in onnxruntime: integers as its kernels read them, experts in narrow formats as stored, since
    they are widened when they are chosen, and all else in float32.
    """
    format = precision.format_of(weight.name, weight.role)
    numbers = math.prod(weight.shape)
    if repacked and format.name in BITS:
        return numbers * (BITS[format.name] / 8 + _FLOAT32 / COLUMNS)
    return stored if weight.role == "expert" and format.scaled else _FLOAT32 * numbers


def are_repacked(files: Mapping[str, object]) -> bool:
    """Whether a bundle's files, by its manifest, have integer matrices for onnxruntime's kernels."""
    return any(name.startswith("weights/cpu-") for name in files)
