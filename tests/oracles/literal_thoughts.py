"""Thoughts of reasoning layers in float64, one position, one step, one layer and one head after another.

A thought looks at what its own position and those before it left in the reasoning layers, and at its own steps before:
each thought is computed here from the hidden states of the sequence as though there were no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

#: Of the norms of both latents, whatever the model's own is.
LATENT_EPS = 1e-6


@dataclass(frozen=True)
class Numbers:
    """Sizes and constants of reasoning layers."""

    layers: int
    steps: int
    heads: int
    latent: int  # width of what keys and values are made of
    nope: int  # channels of a query head that are not rotated
    rope: int  # and that are
    value: int
    eps: float  # of every norm but those of the latents
    frequencies: tuple[float, ...]  # angle per position of each rotated pair
    magnitude: float  # cos and sin are multiplied by it
    scale: float  # scores are multiplied by it
    limit: float | None  # of SwiGLU


@dataclass(frozen=True)
class Thoughts:
    """What came of the thought about each of n positions."""

    logits: Tensor  # [n, V], mixed
    weight: Tensor  # [n], of the thought in the mix
    tokens: list[list[int]]  # [n][steps - 2]: whose embedding rows the steps between first and last entered with
    margins: list[list[float]]  # [n][steps - 2]: largest logit less the second, as a part of the largest magnitude
    hidden: Tensor  # [n, D]: after the last step, before the final norm

    def sure(self, least: float) -> Tensor:
        """[n]: thoughts all of whose tokens were chosen by a margin."""
        return torch.tensor([all(margin > least for margin in one) for one in self.margins], dtype=torch.bool)


def stretched(factor: float, exponent: float) -> float:
    """YaRN's magnitude."""
    return 0.1 * exponent * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_frequencies(channels: int, theta: float, yarn: Any | None) -> tuple[float, ...]:
    """Angle per position of each pair of channels; YaRN's where it is given."""

    def pair_that_turns(times: float) -> float:
        return channels * math.log(yarn.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))

    plain = [theta ** (-2 * j / channels) for j in range(channels // 2)]
    if yarn is None:
        return tuple(plain)
    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_that_turns(yarn.beta_slow)), channels - 1)
    if high == low:
        high += 0.001
    out = []
    for j, fast in enumerate(plain):
        share = min(max((j - low) / (high - low), 0.0), 1.0)  # of the stretched frequency
        out.append(fast * (1 - share) + fast / yarn.factor * share)
    return tuple(out)


def numbers_of(config: Any) -> Numbers:
    """Those of the project's ``ModelConfig``, from its own fields: what ``thinker`` makes of them is under test."""
    own = config.reasoning

    def size(name: str) -> int:
        given = getattr(own, name)
        return getattr(config, name) if given is None else given

    nope, rope, yarn = size("qk_nope_head_dim"), size("qk_rope_head_dim"), config.yarn
    theta, magnitude, scale = config.rope_theta, 1.0, (nope + rope) ** -0.5
    if config.compressed is not None:
        theta = config.compressed.rope_theta
    elif yarn is not None:
        magnitude = stretched(yarn.factor, yarn.mscale) / stretched(yarn.factor, yarn.mscale_all_dim)
        scale *= stretched(yarn.factor, yarn.mscale_all_dim) ** 2
    return Numbers(
        layers=own.layers,
        steps=own.steps,
        heads=size("num_heads"),
        latent=size("kv_lora_rank"),
        nope=nope,
        rope=rope,
        value=size("v_head_dim"),
        eps=config.rms_norm_eps,
        frequencies=rotary_frequencies(rope, theta, yarn),
        magnitude=magnitude,
        scale=scale,
        limit=config.swiglu_limit,
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of one vector."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotated(x: Tensor, position: int, n: Numbers) -> Tensor:
    """Rotary channels [R] at a position; adjacent channels are a pair."""
    out = torch.zeros_like(x)
    for j, frequency in enumerate(n.frequencies):
        cos, sin = n.magnitude * math.cos(position * frequency), n.magnitude * math.sin(position * frequency)
        out[2 * j] = x[2 * j] * cos - x[2 * j + 1] * sin
        out[2 * j + 1] = x[2 * j] * sin + x[2 * j + 1] * cos
    return out


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer, with a bias where it has one."""
    out = w[f"{name}.weight"] @ x
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def silu(x: Tensor) -> Tensor:
    """x times its logistic function."""
    return x / (1 + torch.exp(-x))


# A key and a value of each head, [H][N+R] and [H][V].
Row = tuple[list[Tensor], list[Tensor]]


def row(w: Weights, layer: str, x: Tensor, position: int, n: Numbers) -> Row:
    """What a normed hidden state [D] at a position is attended to by."""
    both = linear(w, f"{layer}.self_attn.kv_a_proj_with_mqa", x)
    latent = norm(both[: n.latent], w[f"{layer}.self_attn.kv_a_layernorm.weight"], LATENT_EPS)
    rope = rotated(both[n.latent :], position, n)
    expanded = linear(w, f"{layer}.self_attn.kv_b_proj", latent)
    keys, values = [], []
    for head in range(n.heads):
        of_head = expanded[head * (n.nope + n.value) : (head + 1) * (n.nope + n.value)]
        keys.append(torch.cat([of_head[: n.nope], rope]))
        values.append(of_head[n.nope :])
    return keys, values


def attention(w: Weights, layer: str, x: Tensor, position: int, rows: Sequence[Row], n: Numbers) -> Tensor:
    """What a normed hidden state [D] at a position finds in the rows."""
    name = f"{layer}.self_attn"
    if f"{name}.q_proj.weight" in w:
        queries = linear(w, f"{name}.q_proj", x)
    else:
        latent = norm(linear(w, f"{name}.q_a_proj", x), w[f"{name}.q_a_layernorm.weight"], LATENT_EPS)
        queries = linear(w, f"{name}.q_b_proj", latent)
    found = []
    for head in range(n.heads):
        query = queries[head * (n.nope + n.rope) : (head + 1) * (n.nope + n.rope)]
        query = torch.cat([query[: n.nope], rotated(query[n.nope :], position, n)])
        scores = torch.stack([query @ keys[head] for keys, _ in rows]) * n.scale
        shares = torch.exp(scores - scores.max())
        shares = shares / shares.sum()
        found.append(sum(share * values[head] for share, (_, values) in zip(shares, rows, strict=True)))
    return linear(w, f"{name}.o_proj", torch.cat(found))


def mlp(w: Weights, layer: str, x: Tensor, n: Numbers) -> Tensor:
    """SwiGLU of a normed hidden state [D]."""
    gate, up = linear(w, f"{layer}.mlp.gate_proj", x), linear(w, f"{layer}.mlp.up_proj", x)
    if n.limit is not None:
        gate, up = gate.clamp(max=n.limit), up.clamp(-n.limit, n.limit)
    return linear(w, f"{layer}.mlp.down_proj", silu(gate) * up)


def think(trunk: Tensor, weights: Weights, n: Numbers, positions: Sequence[int] | None = None) -> Thoughts:
    """A thought about each position of a sequence.

    Args:
        trunk: the model's last hidden states [n, D], before its final norm.
        weights: by the names of a checkpoint; those of the reasoning layers, the embedding, the final norm, the head.
        n: sizes and constants.
        positions: those that are thought about; all of them where not given.
    """
    w = {name: value.double() for name, value in weights.items() if _is_read(name)}
    trunk = trunk.double()
    names = [f"model.reasoning.layers.{j}" for j in range(n.layers)]
    embedding = w["model.embed_tokens.weight"]
    head = w.get("lm_head.weight", embedding)

    def final(hidden: Tensor) -> Tensor:
        return norm(hidden, w["model.norm.weight"], n.eps)

    def entry(layer: str, hidden: Tensor) -> Tensor:
        return norm(hidden, w[f"{layer}.input_layernorm.weight"], n.eps)

    remembered = {
        layer: [row(w, layer, entry(layer, hidden), j, n) for j, hidden in enumerate(trunk)] for layer in names
    }
    every_logits, every_weight, every_token, every_margin, every_hidden = [], [], [], [], []
    for i in range(len(trunk)) if positions is None else positions:
        z, tokens, margins = trunk[i], [], []
        own: dict[str, list[Row]] = {layer: [] for layer in names}
        for k in range(1, n.steps + 1):
            if k == 1:
                entered = w["model.reasoning.start_embedding"]
            elif k == n.steps:
                entered = w["model.reasoning.end_embedding"]
            else:
                guess = head @ final(z)
                best = guess.sort(descending=True)
                tokens.append(int(best.indices[0]))
                margins.append(float((best.values[0] - best.values[1]) / guess.abs().max()))
                entered = embedding[tokens[-1]]
            x = z + entered
            for layer in names:
                normed = entry(layer, x)
                own[layer].append(row(w, layer, normed, i + k, n))
                seen = remembered[layer][: i + 1] + own[layer]
                x = x + attention(w, layer, normed, i + k, seen, n)
                x = x + mlp(w, layer, norm(x, w[f"{layer}.post_attention_layernorm.weight"], n.eps), n)
            z = x
        before, after = final(trunk[i]), final(z)
        talk = torch.cat([before, after])
        for linear_layer in (0, 2):
            talk = linear(w, f"model.reasoning.talk_head.{linear_layer}", talk).clamp(min=0)
        weight = linear(w, "model.reasoning.talk_head.4", talk)[0]
        every_logits.append(head @ ((1 - weight) * before + weight * after))
        every_weight.append(weight)
        every_token.append(tokens)
        every_margin.append(margins)
        every_hidden.append(z)
    return Thoughts(
        torch.stack(every_logits), torch.stack(every_weight), every_token, every_margin, torch.stack(every_hidden)
    )


def _is_read(name: str) -> bool:
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return name in outside or name.startswith("model.reasoning.")


def random_weights(n: Numbers, width: int, q_rank: int | None, inner: int, bias: bool, seed: int = 0) -> Any:
    """Weights of reasoning layers by name, float32, large enough that every path matters.

    Args:
        n: sizes and constants.
        width: D.
        q_rank: of queries; None where they are made at once.
        inner: of SwiGLU.
        bias: whether the projections from and to hidden states have one.
        seed: of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}

    def draw(name: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> None:
        out[name] = mean + scale * torch.randn(shape, generator=generator)

    def matrix(name: str, rows: int, columns: int, biased: bool = False) -> None:
        draw(f"{name}.weight", rows, columns, scale=columns**-0.5)
        if biased:
            draw(f"{name}.bias", rows, scale=0.5)

    for j in range(n.layers):
        layer = f"model.reasoning.layers.{j}"
        attn = f"{layer}.self_attn"
        draw(f"{layer}.input_layernorm.weight", width, mean=1, scale=0.2)
        draw(f"{layer}.post_attention_layernorm.weight", width, mean=1, scale=0.2)
        if q_rank is None:
            matrix(f"{attn}.q_proj", n.heads * (n.nope + n.rope), width)
        else:
            matrix(f"{attn}.q_a_proj", q_rank, width, bias)
            draw(f"{attn}.q_a_layernorm.weight", q_rank, mean=1, scale=0.2)
            matrix(f"{attn}.q_b_proj", n.heads * (n.nope + n.rope), q_rank)
        matrix(f"{attn}.kv_a_proj_with_mqa", n.latent + n.rope, width, bias)
        draw(f"{attn}.kv_a_layernorm.weight", n.latent, mean=1, scale=0.2)
        matrix(f"{attn}.kv_b_proj", n.heads * (n.nope + n.value), n.latent)
        matrix(f"{attn}.o_proj", width, n.heads * n.value, bias)
        matrix(f"{layer}.mlp.gate_proj", inner, width)
        matrix(f"{layer}.mlp.up_proj", inner, width)
        matrix(f"{layer}.mlp.down_proj", width, inner)
    draw("model.reasoning.start_embedding", width)
    draw("model.reasoning.end_embedding", width)
    matrix("model.reasoning.talk_head.0", width, 2 * width, True)
    matrix("model.reasoning.talk_head.2", width, width, True)
    draw("model.reasoning.talk_head.4.weight", 1, width, scale=2 * width**-0.5)
    return out
