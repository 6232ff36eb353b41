"""latent_attention and moe_route in Triton's language, from their equations: what a few dozen lines come to."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

#: (heads, rows, warps, stages) of a block, each of which is worth trying.
TILES = ((64, 32, 8, 2), (32, 32, 4, 2), (16, 64, 4, 2))
#: Blocks that fill a GPU, and rows that a split has at least.
_BLOCKS, _ROWS_OF_SPLIT = 264, 128


@triton.jit
def attend(
    q_at, new_at, cache_at, position_at, partial_at, extent_at, T, SPLITS, scale,
    H: tl.constexpr, L: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some heads of one sequence's token over a share of its rows: a sum of latents, the largest score, a sum."""
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head, row, wide, rotated = (
        tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, ROWS), tl.arange(0, L), L + tl.arange(0, R)
    )  # fmt: skip
    is_head = (head < H)[:, None]
    q_row = q_at + (b * H + head)[:, None] * (L + R)
    q, q_rotated = tl.load(q_row + wide, mask=is_head, other=0.0), tl.load(q_row + rotated, mask=is_head, other=0.0)
    # The new token's own row is seen by the first share.
    own, own_rotated = tl.load(new_at + b * (L + R) + wide), tl.load(new_at + b * (L + R) + rotated)
    first = split == 0
    score = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) + tl.sum(
        q_rotated.to(tl.float32) * own_rotated.to(tl.float32), 1
    )
    top = tl.where(first, score * scale, float("-inf"))
    total = tl.where(first, 1.0, 0.0) + tl.zeros([HEADS], tl.float32)
    z = tl.where(first, own.to(tl.float32)[None, :], 0.0) + tl.zeros([HEADS, L], tl.float32)
    held = tl.minimum(tl.load(position_at + b), T).to(tl.int32)
    each = tl.cdiv(tl.cdiv(held, SPLITS), ROWS) * ROWS
    end = tl.minimum(held, (split + 1) * each)
    for start in range(split * each, end, ROWS):
        there = start + row < end
        at = cache_at + (b * T + start + row)[:, None] * (L + R)
        rows = tl.load(at + wide, mask=there[:, None], other=0.0)
        turned = tl.load(at + rotated, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(rows), input_precision="ieee")
        scores += tl.dot(q_rotated, tl.trans(turned), input_precision="ieee")
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fade, p = tl.exp(top - higher), tl.exp(scores - higher[:, None])
        total = total * fade + tl.sum(p, 1)
        z = z * fade[:, None] + tl.dot(p.to(rows.dtype), rows, input_precision="ieee")
        top = higher
    place = (b * SPLITS + split) * H + head
    tl.store(partial_at + place[:, None] * L + wide, z, mask=is_head)
    tl.store(extent_at + place * 2, top, mask=head < H)
    tl.store(extent_at + place * 2 + 1, total, mask=head < H)


@triton.jit
def join(partial_at, extent_at, z_at, SPLITS, H: tl.constexpr, L: tl.constexpr):
    """The shares of one head of one token, added up."""
    b, head, wide = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, L)
    top, total, z = float("-inf"), 0.0, tl.zeros([L], tl.float32)
    for split in range(0, SPLITS):
        place = (b * SPLITS + split) * H + head
        share = tl.load(extent_at + place * 2)
        higher = tl.maximum(top, share)
        fade, weight = tl.exp(top - higher), tl.exp(share - higher)
        total = total * fade + weight * tl.load(extent_at + place * 2 + 1)
        z = z * fade + weight * tl.load(partial_at + place * L + wide)
        top = higher
    tl.store(z_at + (b * H + head) * L + wide, z / total)


def latent_attention(
    q: torch.Tensor,
    new: torch.Tensor,
    cache: torch.Tensor,
    position: torch.Tensor,
    latent_width: int,
    scale: float,
    tile: tuple[int, int, int, int] = TILES[0],
) -> torch.Tensor:
    """The op of that name, of one new token a sequence."""
    (B, H, W), T, (heads, rows, warps, stages) = q.shape, cache.shape[1], tile
    groups = triton.cdiv(H, heads)
    splits = max(1, min(triton.cdiv(T, _ROWS_OF_SPLIT), triton.cdiv(_BLOCKS, B * groups)))
    partial = torch.empty(B, splits, H, latent_width, dtype=torch.float32, device=q.device)
    extent = torch.empty(B, splits, H, 2, dtype=torch.float32, device=q.device)
    z = torch.empty(B, H, latent_width, dtype=q.dtype, device=q.device)
    attend[(B, groups, splits)](
        q, new, cache, position, partial, extent, T, splits, scale, H=H, L=latent_width, R=W - latent_width,
        HEADS=heads, ROWS=rows, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    join[(B, H)](partial, extent, z, splits, H=H, L=latent_width, num_warps=4)
    return z


@triton.jit
def route(
    logits_at, bias_at, weights_at, indices_at, scale,
    E: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, OPEN: tl.constexpr,
    SIGMOID: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token's experts. Scores are a sigmoid, or the root of a softplus; groups are worth their two best."""
    token, expert = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    x = tl.load(logits_at + token * E + expert, mask=expert < E, other=0.0)
    scores = tl.sigmoid(x) if SIGMOID else tl.sqrt(tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))
    choice = tl.where(expert < E, scores + tl.load(bias_at + expert, mask=expert < E, other=0.0), float("-inf"))
    if OPEN < GROUPS:
        group = tl.arange(0, GROUPS)
        grouped = tl.reshape(choice, [GROUPS, WIDTH // GROUPS])
        best = tl.argmax(grouped, 1)
        others = tl.where(tl.arange(0, WIDTH // GROUPS)[None, :] == best[:, None], float("-inf"), grouped)
        worth = tl.max(grouped, 1) + tl.max(others, 1)
        closed = group >= 0
        for _ in tl.static_range(OPEN):
            taken = group == tl.argmax(tl.where(closed, worth, float("-inf")), 0)
            closed = closed & (taken == 0)
        choice = tl.reshape(tl.where(closed[:, None], float("-inf"), grouped), [WIDTH])
    k = tl.arange(0, triton.next_power_of_2(K))
    weights, indices = tl.zeros_like(k).to(tl.float32), tl.zeros_like(k)
    for i in tl.static_range(K):
        taken = tl.argmax(choice, 0)
        weights = tl.where(k == i, tl.sum(tl.where(expert == taken, scores, 0.0)), weights)
        indices = tl.where(k == i, taken, indices)
        choice = tl.where(expert == taken, float("-inf"), choice)
    if NORM:
        weights = weights / (tl.sum(weights) + 1e-20)
    tl.store(weights_at + token * K + k, weights * scale, mask=k < K)
    tl.store(indices_at + token * K + k, indices.to(tl.int64), mask=k < K)


def moe_route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    scoring: str,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    norm: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op of that name, for the models measured: a token a block of one warp."""
    if scoring not in ("sigmoid", "sqrtsoftplus") or group_score != "top2_sum":
        raise NotImplementedError(f"{scoring} with {group_score}")
    M, E = logits.shape
    weights = torch.empty(M, top_k, dtype=torch.float32, device=logits.device)
    indices = torch.empty(M, top_k, dtype=torch.int64, device=logits.device)
    constants: dict[str, Any] = {"E": E, "WIDTH": triton.next_power_of_2(E), "K": top_k, "NORM": norm}
    constants |= {"GROUPS": num_groups, "OPEN": topk_groups, "SIGMOID": scoring == "sigmoid"}
    if topk_groups < num_groups and constants["WIDTH"] != E:
        raise NotImplementedError(f"groups of {E} experts")
    route[(M,)](logits, bias, weights, indices, scale, **constants, num_warps=1)
    return weights, indices
