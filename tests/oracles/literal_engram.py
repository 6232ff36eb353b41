"""Engram (arXiv 2601.07372, section 2) token by token in float64, the paper's form and DeepSeek-V4.1's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import literal_v41
import numpy as np
import torch

#: Of the norm ahead of the convolution.
CONV_EPS = 1e-5


def keys_of(engram: Any) -> dict[str, Any]:
    """The keys of config.json that the literal hash goes by, of the project's object."""
    return {
        "engram_layer_ids": list(engram.layers),
        "engram_max_ngram_size": engram.max_order,
        "engram_n_heads": engram.heads,
        "engram_vocab_size": engram.buckets,
        "engram_compressed_vocab_size": engram.compressed_vocab,
        "engram_pad_token_id": engram.pad_token_id,
        "engram_seed": engram.seed,
    }


def found(
    text: Mapping[str, Any], token_map: Sequence[int], table: torch.Tensor, layer: int, ids: Sequence[int]
) -> Any:
    """What a layer looks up: for each token, its rows one after another, [n, row_dim]."""
    rows = literal_v41.engram_rows(text, token_map, ids)[layer]
    return torch.stack([torch.cat([table[row] for row in some]) for some in rows])


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def added(
    hidden: torch.Tensor, looked_up: torch.Tensor, weights: Mapping[str, torch.Tensor], eps: float, dilation: int = 1
) -> torch.Tensor:
    """What Engram adds to the streams [n, X, D] of a whole sequence.

    Args:
        hidden: [n, X, D].
        looked_up: [n, row_dim].
        weights: ``wkv.weight``, ``q_weight``, ``k_weight``, and with a convolution ``conv.norm`` and ``conv.weight``.
        eps: of the gates' norms.
        dilation: tokens between the taps of the convolution.
    """
    w = {name: value.double() for name, value in weights.items()}
    hidden, looked_up = hidden.double(), looked_up.double()
    n, X, D = hidden.shape
    gated = torch.zeros(n, X, D, dtype=torch.float64)
    for t in range(n):
        both = w["wkv.weight"] @ looked_up[t]
        value = both[X * D :]
        for m in range(X):
            key = both[m * D : (m + 1) * D]
            fit = float(_norm(hidden[t, m], w["q_weight"][m], eps) @ _norm(key, w["k_weight"][m], eps)) / math.sqrt(D)
            root = math.copysign(math.sqrt(max(abs(fit), 1e-6)), fit)
            gated[t, m] = value / (1 + math.exp(-root))
    if "conv.weight" not in w:
        return gated
    taps = w["conv.weight"].shape[1]
    normed = torch.stack(
        [torch.stack([_norm(gated[t, m], w["conv.norm"][m], CONV_EPS) for m in range(X)]) for t in range(n)]
    )
    out = gated.clone()
    for t in range(n):
        total = torch.zeros(X * D, dtype=torch.float64)
        for j in range(taps):
            if t - j * dilation >= 0:
                total += w["conv.weight"][:, taps - 1 - j] * normed[t - j * dilation].flatten()
        out[t] += (total / (1 + torch.exp(-total))).reshape(X, D)
    return out


def random_weights(streams: int, width: int, row_dim: int, rows: int, row: int, taps: int, seed: int = 0) -> Any:
    """Weights of one layer by name, float32."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((mean + scale * rng.standard_normal(shape)).astype(np.float32))

    weights = {
        "embed.weight": draw(rows, row),
        "wkv.weight": draw((streams + 1) * width, row_dim, scale=row_dim**-0.5),
        "q_weight": draw(streams, width, mean=1, scale=0.2),
        "k_weight": draw(streams, width, mean=1, scale=0.2),
    }
    if taps:
        weights["conv.norm"] = draw(streams, width, mean=1, scale=0.2)
        weights["conv.weight"] = draw(streams * width, taps, scale=taps**-0.5)
    return weights
