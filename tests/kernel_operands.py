"""Operands of every op of published models, of sequences of unequal lengths, and what its kernels must then give."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kernel_comparison import compare, compare_numbers, widened

from v4export import presets
from v4export.plugins.index_select.op import LOWEST, index_scores
from v4export.plugins.kernels.on_cuda import eager

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
try:
    from kernel_cases import _CASES as MAKERS
    from kernel_cases import MODELS, OP, Step
finally:
    del sys.path[0]

#: Experts that are made; a token must find as many different ones as it takes.
EXPERTS = 16
#: Where positions stand among an op's arguments.
POSITION = {
    "latent_attention": 3,
    "thought_attention": 3,
    "sparse_latent_attention": 4,
    "index_select": 4,
    "candidate_select": 4,
    "index_reselect": 5,
    "window_attention": 3,
    "compressed_attention": 5,
    "sparse_attention": 6,
    "compress_tokens": 3,
    "engram_conv": 3,
}
#: Where numbers of selected rows stand, and the tokens that each stands for.
SELECTED = {"sparse_latent_attention": (3, None), "sparse_attention": (5, 8)}
#: Roundings of half a step to 16 bits on the way to a result, where it is not the only one.
STEPS = {"moe_experts": 3.0, "engram_gating": 1.1, "engram_conv": 1.1} | {
    op: 2.0 for op in OP if op.endswith("_attention")
}
#: Round-offs of float32: sums are of thousands of numbers.
WIDE = 64.0


def models_and_ops() -> list[tuple[str, str, str]]:
    """Every op of every model, with the form of its experts; DeepSeek-V3's experts also as plain matrices."""
    found = []
    for model, form in MODELS.items():
        step = Step(shrunk(model), form, 1, 700)
        found += [(model, op, form) for op, make in MAKERS.items() if next(make(step), None)]
    return [*found, ("deepseek-v3", "moe_experts", "plain")]


def shrunk(model: str) -> Any:
    """A published configuration with few experts."""
    config = presets.load(model)
    return replace(config, num_experts=max(EXPERTS, 2 * config.experts_per_token))


def operands(
    model: str, op: str, form: str, sequences: int, held: int, dtype: torch.dtype, device: str
) -> Iterator[list[Any]]:
    """Arguments of an op in one step of sequences that hold up to ``held`` tokens; routing is over all experts."""
    config = shrunk(model) if op == "moe_experts" else presets.load(model)
    for args in MAKERS[op](Step(config, form, sequences, held, device, dtype)):
        yield ragged(op, list(args))


def ragged(op: str, args: list[Any]) -> list[Any]:
    """The same with positions of many kinds, and of numbers only those that a query sees."""
    if op in ("hyper_connection", "hyper_coefficients"):
        args[1] = args[1] / args[1].shape[1] ** 0.5  # logits of order one; far ones are in the emulated tests
    if op not in POSITION:
        return args
    at = POSITION[op]
    held = args[at].flatten() + (1 if op == "thought_attention" else 0)
    position = held - 31 * torch.arange(len(held), device=held.device) % (held + 1)
    if op == "thought_attention":
        args[at] = (position - 1).clamp(min=0)[:, None]
        return args
    args[at] = position
    if op in SELECTED:
        which, ratio = SELECTED[op]
        seen = (position + 1) // (args[ratio] if ratio else 1)
        args[which] = only_seen(args[which], seen)
    return args


def only_seen(numbers: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Numbers below what each query sees, -1 in place of others; the first of all where none is left."""
    if numbers.shape[1] == 0:
        numbers = numbers.new_zeros(len(numbers), 1)
    kept = numbers.masked_fill(numbers >= seen[:, None], -1)
    none = (kept < 0).all(1) & (seen > 0)
    kept[none, 0] = 0
    return kept


def check_op(op: str, args: list[Any], dtype: torch.dtype, run: Callable[..., Any]) -> None:
    """Compare what ``run`` gives with the eager reference in float32 on the same device."""
    wide = [widened(one) for one in args]
    with torch.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
        wanted, got = eager(OP[op].torch_op)(*wide), run(*args)
        scores = SCORES[op](*wide) if op in SCORES else []
    wanted, got = (list(one) if isinstance(one, tuple) else [one] for one in (wanted, got))
    assert len(wanted) == len(got)
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        if scores:
            compare_numbers(ours, theirs, scores[i], WIDE)
        else:
            compare(ours, theirs, dtype, STEPS.get(op, 1.0), WIDE)


def _scores(q, weights, new, cache, position, ratio, scale):
    """Of every key in the column of its number, the lowest float where a query cannot see it."""
    score, number = index_scores(q, weights, new, cache, position, ratio, scale)
    return torch.full_like(score, LOWEST).scatter_reduce(1, number, score, "amax")


def _of_keys(q, weights, new, cache, position, top_k, ratio, scale):
    return [_scores(q, weights, new, cache, position, ratio, scale)]


def _of_candidates(q, weights, new, cache, position, top_k, ratio, scale, top_blocks, size):
    scores = _scores(q, weights, new, cache, position, ratio, scale)
    blocks = torch.nn.functional.pad(scores, (0, -scores.shape[1] % size), value=LOWEST).unflatten(1, (-1, size))
    best = blocks.amax(-1)
    newest = (position + 1) // ratio - 1
    return [scores, best.masked_fill(torch.arange(best.shape[1]) == (newest // size)[:, None], float("inf"))]


def _among_blocks(q, weights, new, cache, blocks, position, top_k, ratio, scale, size):
    scores = _scores(q, weights, new, cache, position, ratio, scale)
    among = (torch.arange(scores.shape[1]) // size == blocks[..., None]).any(1)
    return [scores.masked_fill(~among, LOWEST)]


#: What each output of an op that selects is ordered by.
SCORES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "index_select": _of_keys,
    "candidate_select": _of_candidates,
    "index_reselect": _among_blocks,
}
