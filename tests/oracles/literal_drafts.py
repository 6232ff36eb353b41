"""DeepSeek-V4's multi-token prediction layer once more: slow, obvious, token by token, from the equations.

After DeepSeek's inference code for V4 (``MTPBlock``): embedding and streams are normed and projected, summed for each
stream, and pass one block of a sliding window; the streams are collapsed by coefficients of their own, normed, and
multiplied with the model's head. Arrays are float64; D hidden, X streams, H heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from v4export.config import ModelConfig

Weights = Callable[[str], np.ndarray]


def rms(x: np.ndarray, eps: float, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * w."""
    return weight * x / np.sqrt((x * x).mean() + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def turned(x: np.ndarray, position: int, width: int, theta: float) -> np.ndarray:
    """The last ``width`` numbers rotated in pairs by their position."""
    out = x.copy()
    start = len(x) - width
    for pair in range(width // 2):
        angle = position * theta ** (-2 * pair / width)
        a, b = x[start + 2 * pair], x[start + 2 * pair + 1]
        out[start + 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
        out[start + 2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


class Layer:
    """The layer over one sequence.

    Args:
        config: of the model.
        weights: the checkpoint's, by names within the layer, and ``embed`` and ``head``.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.keys: list[np.ndarray] = []

    def draft(self, tokens: Sequence[int], features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [n, V] and streams [n, X, D] of tokens that follow those whose features [n, X, D] are given."""
        steps = [self._token(token, streams) for token, streams in zip(tokens, features, strict=True)]
        return np.stack([logits for logits, _ in steps]), np.stack([streams for _, streams in steps])

    def _token(self, token: int, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, eps = self.weights, self.config.rms_norm_eps
        embedded = w("e_proj.weight") @ rms(w("embed")[token], eps, w("enorm.weight"))
        streams = np.stack([embedded + w("h_proj.weight") @ rms(f, eps, w("hnorm.weight")) for f in features])
        streams = self._half(streams, "attn_hc", "input_layernorm", self._attention)
        streams = self._half(streams, "ffn_hc", "post_attention_layernorm", self._experts)
        mixes = w("hc_head.hc_fn") @ rms(streams.ravel(), eps)
        shares = sigmoid(mixes * w("hc_head.hc_scale") + w("hc_head.hc_base")) + self.config.hyper.eps
        collapsed = sum(share * stream for share, stream in zip(shares, streams, strict=True))
        return w("head") @ rms(collapsed, eps, w("shared_head.norm.weight")), streams

    def _half(
        self, streams: np.ndarray, hyper: str, norm: str, inner: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """One sublayer between its hyper-connections."""
        w, X, h = self.weights, len(streams), self.config.hyper
        mixes = w(f"{hyper}.fn") @ rms(streams.ravel(), self.config.rms_norm_eps)
        base, scale = w(f"{hyper}.base"), w(f"{hyper}.scale")
        pre = sigmoid(mixes[:X] * scale[0] + base[:X]) + h.eps
        post = 2 * sigmoid(mixes[X : 2 * X] * scale[1] + base[X : 2 * X])
        comb = (mixes[2 * X :] * scale[2] + base[2 * X :]).reshape(X, X)
        comb = np.exp(comb - comb.max(1, keepdims=True))
        comb = comb / comb.sum(1, keepdims=True) + h.eps
        comb = comb / (comb.sum(0, keepdims=True) + h.eps)
        for _ in range(h.sinkhorn_iterations - 1):
            comb = comb / (comb.sum(1, keepdims=True) + h.eps)
            comb = comb / (comb.sum(0, keepdims=True) + h.eps)
        z = rms(sum(pre[j] * streams[j] for j in range(X)), self.config.rms_norm_eps, w(f"{norm}.weight"))
        y = inner(z)
        return np.stack([post[i] * y + sum(comb[j, i] * streams[j] for j in range(X)) for i in range(X)])

    def _attention(self, x: np.ndarray) -> np.ndarray:
        w, c, a, eps = self.weights, self.config, self.config.compressed, self.config.rms_norm_eps
        at, turn = len(self.keys), (c.qk_rope_head_dim, c.rope_theta)
        latent = rms(w("self_attn.q_a_proj.weight") @ x, eps, w("self_attn.q_a_norm.weight"))
        heads = (w("self_attn.q_b_proj.weight") @ latent).reshape(c.num_heads, a.head_dim)
        key = rms(w("self_attn.kv_proj.weight") @ x, eps, w("self_attn.kv_norm.weight"))
        self.keys.append(turned(key, at, *turn))
        seen = self.keys[max(0, at - a.window + 1) :]
        out = []
        for head, sink in zip(heads, w("self_attn.sinks"), strict=True):
            query = turned(rms(head, eps), at, *turn)
            scores = np.array([query @ key for key in seen]) / np.sqrt(a.head_dim)
            most = max(scores.max(), sink)
            each = np.exp(scores - most)
            value = sum(e * key for e, key in zip(each, seen, strict=True)) / (each.sum() + np.exp(sink - most))
            out.append(turned(value, -at, *turn))
        groups = np.concatenate(out).reshape(a.o_groups, -1)
        low = w("self_attn.o_a_proj.weight").reshape(a.o_groups, a.o_lora_rank, -1)
        return w("self_attn.o_b_proj.weight") @ np.concatenate([m @ g for m, g in zip(low, groups, strict=True)])

    def _experts(self, x: np.ndarray) -> np.ndarray:
        w, c = self.weights, self.config
        scores = np.sqrt(np.log1p(np.exp(w("mlp.gate.weight") @ x)))
        chosen = np.argsort(-(scores + w("mlp.gate.e_score_correction_bias")), kind="stable")[: c.experts_per_token]
        total = scores[chosen].sum()
        out = self._swiglu("mlp.shared_experts", x)
        for e in chosen:
            out = out + c.routed_scaling_factor * scores[e] / total * self._swiglu(f"mlp.experts.{e}", x)
        return out

    def _swiglu(self, name: str, x: np.ndarray) -> np.ndarray:
        w, limit = self.weights, self.config.swiglu_limit
        gate, up = w(f"{name}.gate_proj.weight") @ x, w(f"{name}.up_proj.weight") @ x
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return w(f"{name}.down_proj.weight") @ (gate * sigmoid(gate) * up)
