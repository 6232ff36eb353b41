"""Operands of every kernel at the shapes of published models, for measuring and for compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from v4export import presets
from v4export.config import ModelConfig
from v4export.plugins import OPS
from v4export.plugins.kernels.call import Recorder
from v4export.plugins.kernels.kernel import Compilable

#: Presets, and the form in which their experts are stored.
MODELS = {
    "deepseek-v2-lite": "plain",
    "deepseek-v3": "fp8",
    "deepseek-v3.2": "fp8",
    "kimi-k2": "fp8",
    "deepseek-v4-flash": "fp4",
    "deepseek-v4.1-flash": "fp4",
}
OP = {op.torch_op._name.removeprefix("v4::"): op for op in OPS}


@dataclass(frozen=True)
class Case:
    """One op of a model, given its operands.

    Attributes:
        model: preset.
        op: name of the op.
        args: what it is called with.
    """

    model: str
    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """Tensors of one step of decoding.

    Attributes:
        config: of the model.
        form: of its experts: ``fp8``, ``fp4`` or ``plain``.
        sequences: B, each with one new token.
        held: tokens that each holds.
        device: of the tensors.
        dtype: of the activations.
    """

    config: ModelConfig
    form: str
    sequences: int
    held: int
    device: str = "meta"
    dtype: torch.dtype = torch.bfloat16

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def choice(self, count: int, most: int, *shape: int) -> torch.Tensor:
        """Rows of ``most`` different numbers below ``count``."""
        if self.device == "meta":
            return torch.empty(*shape, most, dtype=torch.int64, device="meta")
        return torch.rand(*shape, count, device=self.device).topk(most, -1).indices

    @property
    def position(self) -> torch.Tensor:
        return torch.full((self.sequences,), self.held, dtype=torch.int64, device=self.device)

    def matrices(self, count: int, rows: int, columns: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """An expert's matrices and their multipliers, in the model's form."""
        if self.form == "plain":
            return list(self.numbers(count, rows, columns).div_(columns**0.5)), []
        packed = columns if self.form == "fp8" else columns // 2
        codes = torch.empty(count, rows, packed, dtype=torch.uint8, device=self.device)
        if self.device != "meta":
            codes.random_(0, 120)
        if self.form == "fp8":
            scales = torch.full((count, -(-rows // 128), -(-columns // 128)), 1e-3, device=self.device)
            return list(codes.view(torch.float8_e4m3fn)), list(scales)
        powers = torch.full((count, rows, columns // 32), 2.0**-6, device=self.device).to(torch.bfloat16)
        return list(codes), list(powers)


def cases(model: str, step: Step) -> Iterator[Case]:
    """Every op of a model in one step."""
    for name, make in _CASES.items():
        for args in make(step):
            yield Case(model, name, args)


def compiled(
    budgets: Sequence[int], dtype: torch.dtype = torch.bfloat16, models: Sequence[str] = ()
) -> Iterator[tuple[str, Compilable]]:
    """Each way to compile a kernel, once, with the first model of it; all models unless some are named.

    Args:
        budgets: bytes of shared memory that a launch may have.
        dtype: of the activations.
        models: presets.
    """
    seen = set()
    for model in models or MODELS:
        for budget in budgets:
            recorder = Recorder(budget)
            for case in cases(model, step_of(model, dtype=dtype)):
                OP[case.op].kernels(recorder, *case.args)
            for one in recorder.compiled:
                if (key := (one.launch.entry, one.defines)) not in seen:
                    seen.add(key)
                    yield model, one


def step_of(
    model: str, sequences: int = 2, held: int = 4096, device: str = "meta", dtype: torch.dtype = torch.bfloat16
) -> Step:
    """A step of a preset."""
    return Step(presets.load(model), MODELS[model], sequences, held, device, dtype)


def _route(s: Step) -> Iterator[tuple[Any, ...]]:
    c = s.config
    logits, bias = (
        s.numbers(*shape, dtype=torch.float32) for shape in ((s.sequences, c.num_experts), (c.num_experts,))
    )
    groups = (c.num_groups, c.topk_groups, "top2_sum" if c.topk_method == "noaux_tc" else "max")
    yield logits, bias, c.experts_per_token, c.scoring, *groups, c.norm_topk_prob, c.routed_scaling_factor


def _hash(s: Step) -> Iterator[tuple[Any, ...]]:
    c = s.config
    if c.hash_layers:
        logits = s.numbers(s.sequences, c.num_experts, dtype=torch.float32)
        table, ids = s.choice(c.num_experts, c.experts_per_token, 1000), s.choice(1000, s.sequences)
        yield logits, table, ids, c.scoring, c.norm_topk_prob, c.routed_scaling_factor


def _experts(s: Step) -> Iterator[tuple[Any, ...]]:
    c = s.config
    D, F, E, K = c.hidden_size, c.moe_intermediate_size, c.num_experts, c.experts_per_token
    parts = [s.matrices(E, *shape) for shape in ((F, D), (F, D), (D, F))]
    x, weights = s.numbers(s.sequences, D), s.numbers(s.sequences, K, dtype=torch.float32)
    block = (1, 32) if s.form == "fp4" else (128, 128)
    yield (
        x,
        weights,
        s.choice(E, K, s.sequences),
        *(m for m, _ in parts),
        *(p for _, p in parts),
        *([], [], []),
        {"plain": "", "fp4": "mxfp4"}.get(s.form, s.form),
        *block,
        c.swiglu_limit,
    )


def _hyper(s: Step, rest: bool) -> Iterator[tuple[Any, ...]]:
    if h := s.config.hyper:
        X, D = h.streams, s.config.hidden_size
        numbers = (2 + X) * X
        weights = [s.numbers(*shape, dtype=torch.float32) for shape in ((numbers, X * D), (numbers,), (3,))]
        if h.single_pass == rest:
            yield s.numbers(s.sequences, X, D), *weights, h.sinkhorn_iterations, h.eps, 1e-6


def _mix(s: Step) -> Iterator[tuple[Any, ...]]:
    if h := s.config.hyper:
        X, D, M = h.streams, s.config.hidden_size, s.sequences
        post, comb = (s.numbers(*shape, dtype=torch.float32) for shape in ((M, X), (M, X, X)))
        yield s.numbers(M, X, D), s.numbers(M, D), post, comb


def _gating(s: Step) -> Iterator[tuple[Any, ...]]:
    if s.config.engram and s.config.hyper:
        X, D, M = s.config.hyper.streams, s.config.hidden_size, s.sequences
        yield s.numbers(M, X, D), s.numbers(M, X, D), s.numbers(M, D), s.numbers(X, D), s.numbers(X, D), 1e-20


def _conv(s: Step) -> Iterator[tuple[Any, ...]]:
    if s.config.engram and s.config.hyper:
        P = s.config.hyper.streams * s.config.hidden_size
        yield s.numbers(s.sequences, 1, P), s.numbers(s.sequences, 9, P), s.numbers(P, 4), s.position, 3


def _latent(s: Step, sparse: bool) -> Iterator[tuple[Any, ...]]:
    c = s.config
    if c.compressed is None and bool(c.indexer) == sparse:
        B, H, W = s.sequences, c.num_heads, c.latent_dim
        rows = s.numbers(B * 1, H, W), s.numbers(B, 1, W), s.numbers(B, s.held, W)
        chosen = [s.choice(s.held, min(c.indexer.top_k, s.held), B)] if c.indexer else []
        yield *rows, *chosen, s.position, c.kv_lora_rank, 0.1


def _thought(s: Step) -> Iterator[tuple[Any, ...]]:
    for q, new, cache, position, *rest in _latent(s, False):
        yield q, new, cache, position[:, None] - 1, *rest


def _index(s: Step, *extra: int, blocks: bool = False) -> Iterator[tuple[Any, ...]]:
    c, B = s.config, s.sequences
    if c.indexer is None or (bool(extra) != bool(c.compressed and c.compressed.shared)):
        return
    ratio = max(1, min((r for r in c.compressed.ratios if r), default=1)) if c.compressed else 1
    W, H = c.indexer.head_dim, c.indexer.num_heads
    keys = (
        s.numbers(B, H, W),
        s.numbers(B, H, dtype=torch.float32),
        s.numbers(B, 1, W),
        s.numbers(B, s.held // ratio, W),
    )
    size = extra[-1] if extra else 1
    count = s.held // ratio // size
    marked = [s.choice(count, min(2048, count), B)] if blocks else []
    yield *keys, *marked, s.position, c.indexer.top_k, ratio, 0.1, *(extra[1:] if blocks else extra)


def _window(s: Step) -> Iterator[tuple[Any, ...]]:
    if c := s.config.compressed:
        B, H, W = s.sequences, s.config.num_heads, c.head_dim
        yield (
            s.numbers(B, H, W),
            s.numbers(B, 1, W),
            s.numbers(B, c.window, W),
            s.position,
            s.numbers(H, dtype=torch.float32),
            0.1,
        )


def _entries(s: Step, sparse: bool) -> Iterator[tuple[Any, ...]]:
    if (c := s.config.compressed) and s.config.indexer and (sparse or c.shared is None):
        B, W, ratios = s.sequences, c.head_dim, [r for r in c.ratios if r]
        ratio = min(ratios) if sparse else max(ratios)
        q, new, ring, position, sinks, scale = next(_window(s))
        held = s.held // ratio
        chosen = [s.choice(held, min(s.config.indexer.top_k, held), B)] if sparse else []
        yield q, new, ring, s.numbers(B, 1, W), s.numbers(B, held, W), *chosen, position, sinks, ratio, scale


def _compress(s: Step) -> Iterator[tuple[Any, ...]]:
    if c := s.config.compressed:
        for ratio, halves in ((4, 2), (128, 1)) if c.shared is None else ((2, 1),):
            P = 2 * halves * c.head_dim
            rows = (
                s.numbers(s.sequences, 1, P, dtype=torch.float32),
                s.numbers(s.sequences, halves * ratio, P, dtype=torch.float32),
            )
            yield *rows, s.numbers(ratio, P // 2, dtype=torch.float32), s.position, ratio, halves


_CANDIDATES = (2048, 8)
_CASES: dict[str, Callable[[Step], Iterator[tuple[Any, ...]]]] = {
    "moe_route": _route,
    "hash_route": _hash,
    "moe_experts": _experts,
    "hyper_connection": lambda s: _hyper(s, False),
    "hyper_coefficients": lambda s: _hyper(s, True),
    "hyper_mix": _mix,
    "engram_gating": _gating,
    "engram_conv": _conv,
    "latent_attention": lambda s: _latent(s, False),
    "sparse_latent_attention": lambda s: _latent(s, True),
    "thought_attention": _thought,
    "index_select": _index,
    "candidate_select": lambda s: _index(s, *_CANDIDATES),
    "index_reselect": lambda s: _index(s, *_CANDIDATES, blocks=True),
    "window_attention": _window,
    "compressed_attention": lambda s: _entries(s, False),
    "sparse_attention": lambda s: _entries(s, True),
    "compress_tokens": _compress,
}
