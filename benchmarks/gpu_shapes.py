"""Which ops at which shapes are measured on a GPU, and their operands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_floors import sized
from kernel_cases import _CASES, Step

from v4export import presets

K = 1024
#: Copies of operands that take turns so that the cache does not hold them, and bytes that these may take.
_TURNS, _BYTES = 32, 4 << 30
#: Where an op's arguments name what it reads of larger operands, and how many there are to choose from.
CHOSEN: dict[str, tuple[int, Callable[[Sequence[Any]], int]]] = {
    "moe_experts": (2, lambda args: len(args[3])),
    "sparse_attention": (5, lambda args: args[4].shape[1]),
    "sparse_latent_attention": (3, lambda args: args[2].shape[1]),
}


class Operands(Step):
    """Random numbers in their own type: the largest caches do not fit in float32 beside themselves."""

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normally distributed."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device).normal_()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: title of it.
        model: preset.
        op: name of the op.
        what: where a model has the op in several forms, which.
        sequences: each with one new token.
        held: cached tokens of each, if it matters.
        form: of experts.
        experts: how many; all of the model's unless given.
        variant: which of the op's cases.
    """

    table: str
    model: str
    op: str
    what: str
    sequences: int
    held: int | None = None
    form: str = "plain"
    experts: int | None = None
    variant: int = 0

    def operands(self, device: str) -> tuple[Any, ...]:
        """Arguments of the op."""
        if self.op == "moe_experts":
            return self._experts(device)
        held = self.held or 4 * K
        # The new token completes an entry.
        held -= self.op == "compress_tokens"
        step = Operands(presets.load(self.model), self.form, self.sequences, held, device)
        return list(_CASES[self.op](step))[self.variant]

    def _experts(self, device: str) -> tuple[Any, ...]:
        config = presets.load(self.model)
        step = Operands(replace(config, num_experts=self.experts or config.num_experts), self.form, 1, 1, device)
        _, _, _, *matrices = _matrices(step)
        some = replace(step, sequences=self.sequences)
        M, E, chosen = self.sequences, step.config.num_experts, config.experts_per_token
        x, weights = some.numbers(M, config.hidden_size), some.numbers(M, chosen, dtype=torch.float32)
        return x, weights, some.choice(E, chosen, M), *matrices


@functools.lru_cache(maxsize=1)
def _matrices(step: Operands) -> tuple[Any, ...]:
    """Of a model, made once for all its rows: gigabytes."""
    return next(_CASES["moe_experts"](step))


def forget() -> None:
    """Let go of the last model's matrices."""
    _matrices.cache_clear()


def in_turn(op: str, args: Sequence[Any], moved: float, l2: int) -> list[tuple[Any, ...]]:
    """The operands, and others like them, in all larger than a cache of so many bytes."""
    wanted = min(_TURNS, math.ceil(3 * l2 / max(moved, 1)))
    held = sized(list(args))
    if op in CHOSEN and held > 3 * l2:
        which, count_of = CHOSEN[op]
        most, each = count_of(args), args[which].shape[-1]
        shifted = ((args[which] + i * each) % most for i in range(max(1, min(wanted, most // each))))
        return [(*args[:which], numbers, *args[which + 1 :]) for numbers in shifted]
    count = max(1, min(wanted, _BYTES // max(held, 1)))
    others = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args) for _ in range(count - 1)]
    return [tuple(args), *others]


LATENT, ROUTING, EXPERTS, V4 = "Latent attention", "Routing", "Experts", "DeepSeek-V4 and V4.1"
#: Model, form, experts if not all, and what to call it.
_EXPERTS = (
    ("deepseek-v3", "fp8", None, "fp8"),
    ("deepseek-v3", "plain", 64, "bf16, 64 experts"),
    ("kimi-k2", "fp8", None, "fp8"),
    ("deepseek-v4-flash", "fp4", None, "fp4"),
)
_OF_CACHES = ("sparse_attention", "compressed_attention", "index_select")
#: What V4's decoders do whatever they have cached: model, op, which of its cases, and what to call it.
_OF_TOKENS = (
    ("deepseek-v4-flash", "window_attention", 0, "window_attention"),
    ("deepseek-v4-flash", "hyper_connection", 0, "hyper_connection"),
    ("deepseek-v4-flash", "hyper_mix", 0, "hyper_mix"),
    ("deepseek-v4-flash", "compress_tokens", 0, "compress_tokens, entries of 4"),
    ("deepseek-v4-flash", "compress_tokens", 1, "compress_tokens, entries of 128"),
    ("deepseek-v4.1-flash", "engram_gating", 0, "engram_gating"),
    ("deepseek-v4.1-flash", "engram_conv", 0, "engram_conv"),
)


def rows(quick: bool) -> Iterator[Row]:
    """Every row, a table after the other."""
    latent = [(1, 8 * K), (64, 8 * K)] if quick else [(b, t * K) for t in (1, 8, 32, 128) for b in (1, 16, 64, 256)]
    for model in ("deepseek-v3", "kimi-k2")[: 1 if quick else 2]:
        for sequences, held in latent:
            yield Row(LATENT, model, "latent_attention", "", sequences, held)
    for model in ("deepseek-v3", "kimi-k2", "deepseek-v4-flash"):
        for tokens in (1,) if quick else (1, 16, 256):
            yield Row(ROUTING, model, "moe_route", "", tokens)
    for model, form, experts, what in _EXPERTS[:: 3 if quick else 1]:
        for tokens in (1, 16) if quick else (1, 4, 16, 64, 256):
            yield Row(EXPERTS, model, "moe_experts", what, tokens, None, form, experts)
    for op in _OF_CACHES:
        for sequences, held in [(16, 8 * K)] if quick else [(1, 8 * K), (1, 128 * K), (16, 8 * K), (64, 32 * K)]:
            yield Row(V4, "deepseek-v4-flash", op, op, sequences, held)
    for model, op, variant, what in _OF_TOKENS:
        for tokens in (1,) if quick else (1, 16, 256):
            yield Row(V4, model, op, what, tokens, variant=variant)
