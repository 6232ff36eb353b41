"""DeepSeek-V4.1's text path, token by token in float64: slow, without a cache, sharing no code with v4export.

Names of sizes: d hidden width, X streams, H heads, W head width, R rotated channels, Hi and I heads and width of the
indexer, r tokens per compressed entry. A *number* is the index of a compressed entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Text = Mapping[str, Any]


# Engram: which rows of the tables the tokens read.


def is_prime(n: int) -> bool:
    """By trial division."""
    if n < 2:
        return False
    divisor = 2
    while divisor * divisor <= n:
        if n % divisor == 0:
            return False
        divisor += 1
    return True


def engram_primes(text: Text) -> dict[int, list[list[int]]]:
    """Per Engram layer, the size of the table of each order (2..N) and head; no size occurs twice in the model."""
    seen: set[int] = set()
    primes = {}
    for layer in text["engram_layer_ids"]:
        orders = []
        for _ in range(2, text["engram_max_ngram_size"] + 1):
            current = text["engram_vocab_size"] - 1
            heads = []
            for _ in range(text["engram_n_heads"]):
                current += 1
                while current in seen or not is_prime(current):
                    current += 1
                seen.add(current)
                heads.append(current)
            orders.append(heads)
        primes[layer] = orders
    return primes


def engram_multipliers(text: Text) -> dict[int, list[int]]:
    """Per Engram layer, the odd factor of each token of an n-gram, the newest token first."""
    multipliers = {}
    for layer in text["engram_layer_ids"]:
        rng = np.random.default_rng(text.get("engram_seed", 0) + 10007 * layer)
        bound = (2**63 - 1) // text["engram_compressed_vocab_size"]
        half = max(1, bound // 2)
        drawn = rng.integers(0, half, size=text["engram_max_ngram_size"], dtype=np.int64)
        multipliers[layer] = [2 * int(number) + 1 for number in drawn]
    return multipliers


def compressed_ids(token_map: Sequence[int], ids: Iterable[int]) -> list[int]:
    """Ids of the tokens in Engram's own vocabulary."""
    return [int(token_map[token]) for token in ids]


def engram_hash(text: Text, compressed: Sequence[int], pad: int, multipliers: Sequence[int]) -> list[list[int]]:
    """For each token, the hash of the n-gram that ends there, for each order 2..N."""
    hashes = []
    for t in range(len(compressed)):
        mixed = compressed[t] * multipliers[0]
        orders = []
        for n in range(2, text["engram_max_ngram_size"] + 1):
            back = t - n + 1
            mixed ^= (compressed[back] if back >= 0 else pad) * multipliers[n - 1]
            orders.append(mixed)
        hashes.append(orders)
    return hashes


def engram_rows(text: Text, token_map: Sequence[int], ids: Sequence[int]) -> dict[int, list[list[int]]]:
    """Per Engram layer and token, the rows of the layer's table, in the order (order, head)."""
    all_primes, all_multipliers = engram_primes(text), engram_multipliers(text)
    compressed = compressed_ids(token_map, ids)
    pad = int(token_map[text["engram_pad_token_id"]])
    rows = {}
    for layer in text["engram_layer_ids"]:
        tokens = []
        for orders in engram_hash(text, compressed, pad, all_multipliers[layer]):
            offset = 0
            token = []
            for mixed, primes in zip(orders, all_primes[layer], strict=True):
                for prime in primes:
                    token.append(mixed % prime + offset)
                    offset += prime
            tokens.append(token)
        rows[layer] = tokens
    return rows


# Pieces of the model that know no layer.


def rotary_frequencies(channels: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Angle per position of each channel pair; YaRN's where there is scaling."""
    frequencies = []
    for j in range(channels // 2):
        frequency = theta ** (-2 * j / channels)
        if scaling is not None:

            def pair_turning(times: float) -> float:
                positions = scaling["original_max_position_embeddings"]
                return channels * math.log(positions / (times * 2 * math.pi)) / (2 * math.log(theta))

            low: float = max(math.floor(pair_turning(scaling["beta_fast"])), 0)
            high: float = min(math.ceil(pair_turning(scaling["beta_slow"])), channels - 1)
            if low == high:
                high += 0.001
            ramp = min(max((j - low) / (high - low), 0.0), 1.0)
            frequency = frequency / scaling["factor"] * ramp + frequency * (1 - ramp)
        frequencies.append(frequency)
    return torch.tensor(frequencies, dtype=torch.float64)


def rotate(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Turn the adjacent pairs of the last channels of x [..., C]; a negative position turns back."""
    channels = 2 * len(frequencies)
    pairs = torch.view_as_complex(x[..., -channels:].reshape(*x.shape[:-1], channels // 2, 2).contiguous())
    turned = torch.view_as_real(pairs * torch.exp(1j * position * frequencies)).flatten(-2)
    return torch.cat([x[..., :-channels], turned], dim=-1)


def sink_softmax(logits: Tensor, sink: Tensor) -> Tensor:
    """Softmax of [H, keys] where each head's sink takes a share that goes nowhere."""
    largest = torch.maximum(logits.amax(dim=1), sink)
    weights = torch.exp(logits - largest[:, None])
    return weights / (weights.sum(dim=1) + torch.exp(sink - largest))[:, None]


def best(scores: Mapping[int, float], count: int) -> list[int]:
    """Keys of the highest scores; of equal scores the lower key."""
    return sorted(scores, key=lambda number: (-scores[number], number))[:count]


def kept_blocks(scores: Mapping[int, float], size: int, count: int) -> set[int]:
    """Blocks of numbers that later index sources may choose from; scores are those of all visible numbers."""
    if not scores:
        return set()
    block_scores: dict[int, float] = {}
    for number, score in scores.items():
        block = number // size
        block_scores[block] = max(score, block_scores.get(block, -math.inf))
    newest = max(scores) // size
    del block_scores[newest]
    return {newest, *best(block_scores, count - 1)}


class LiteralV41:
    """The model over whole sequences.

    Args:
        text: the keys of config.json's text_config.
        weights: DeepSeek's tensor names -> values, not quantised; linear weights are [out, in].
        token_map: token id -> id in Engram's vocabulary; needed where there are Engram layers.

    """

    def __init__(
        self, text: Text, weights: Mapping[str, np.ndarray | Tensor], token_map: np.ndarray | None = None
    ) -> None:
        self.text = text
        self.token_map = token_map
        self.weights = {
            name: value.detach().double()
            if isinstance(value, Tensor)
            else torch.from_numpy(np.array(value, dtype=np.float64))
            for name, value in weights.items()
        }
        R = text["qk_rope_head_dim"]
        self.plain_frequencies = rotary_frequencies(R, text["rope_theta"], None)
        self.compress_frequencies = rotary_frequencies(R, text["compress_rope_theta"], text.get("rope_scaling"))

        self.engram_layers = list(text.get("engram_layer_ids") or [])
        L = text["num_hidden_layers"]
        self.kv_sources = [layer for layer in text["kv_source_layer_ids"] if layer < L]
        self.index_sources = [layer for layer in text["index_source_layer_ids"] if layer < L]
        self.candidate_source = text["candidate_source_layer_id"]
        self._check_layers()

    def _check_layers(self) -> None:
        """Refuse configs over which the equations say nothing."""
        if self.engram_layers and self.token_map is None:
            raise ValueError("Engram layers need a token map")
        if self.candidate_source >= 0 and self.candidate_source not in self.index_sources:
            raise ValueError("the candidate source is no index source")
        for layer in range(self.text["num_hidden_layers"]):
            if (layer in self.kv_sources or layer in self.index_sources) and self.ratio(layer) == 0:
                raise ValueError(f"layer {layer} is a source without a compression ratio")
            if self.ratio(layer) == 0:
                continue
            kv_source, index_source = latest(self.kv_sources, layer), latest(self.index_sources, layer)
            if kv_source is None or index_source is None:
                raise ValueError(f"layer {layer} has no source")
            if self.ratio(kv_source) != self.ratio(layer):
                raise ValueError(f"layer {layer} compresses otherwise than its source {kv_source}")
            if self.ratio(index_source) != self.ratio(layer):
                # The numbers that layer selected would stand for other tokens here, later ones perhaps.
                raise ValueError(f"layer {layer} compresses otherwise than its index source {index_source}")

    def ratio(self, layer: int) -> int:
        """Tokens per compressed entry; 0: the layer has only its window."""
        return self.text["compress_ratios"][layer]

    def weight(self, layer: int, name: str) -> Tensor:
        """A tensor of a layer."""
        return self.weights[f"layers.{layer}.{name}"]

    def rms(self, x: Tensor, weight: Tensor | float) -> Tensor:
        """RMS norm over the last dimension."""
        return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.text["rms_norm_eps"])

    @torch.inference_mode()
    def logits(self, ids: list[int], decoder_start: int = 0) -> Tensor:
        """Logits [n, V] of a whole sequence; NaN for tokens before decoder_start where the model has a decoder.

        The decoder is the last kv source and all layers after it. Tokens before decoder_start go no further than that
        source's compressed entries.
        """
        text = self.text
        X, V, eye = text["hc_mult"], text["vocab_size"], torch.eye(text["hc_mult"], dtype=torch.float64)
        rows = engram_rows(text, self.token_map, ids) if self.engram_layers else {}
        last_kv_source = max(self.kv_sources, default=None)

        # Of each token, by its position. Tokens the decoder leaves out lose theirs, so that using one fails.
        streams: dict[int, Tensor] = {i: self.weights["embed.weight"][ids[i]].repeat(X, 1) for i in range(len(ids))}
        pre: dict[int, Tensor] = {i: eye[0] for i in streams}
        # Of the most recent kv source.
        entries: list[Tensor] = []
        index_keys: list[Tensor] = []
        # Of the most recent index source, and of the candidate source.
        selected: dict[int, list[int]] = {}
        blocks: dict[int, set[int]] = {}

        for layer in range(text["num_hidden_layers"]):
            if layer in self.engram_layers:
                for i in streams:
                    streams[i] = self._engram(layer, streams[i], rows[layer][i])

            norm = self.weight(layer, "attn_norm.weight")
            inputs = {i: self.rms(pre[i] @ streams[i], norm) for i in streams}
            if layer in self.kv_sources:
                entries, index_keys = self._compress(layer, inputs)
            if layer == last_kv_source:
                for i in range(min(decoder_start, len(ids))):
                    del streams[i], pre[i], inputs[i]

            frequencies = self.compress_frequencies if self.ratio(layer) else self.plain_frequencies
            window_keys = {i: self._window_key(layer, inputs[i], i, frequencies) for i in inputs}
            for i in streams:
                compressed_query = self.rms(
                    self.weight(layer, "attn.wq_a.weight") @ inputs[i], self.weight(layer, "attn.q_norm.weight")
                )
                if layer in self.index_sources:
                    scores = self._index_scores(layer, i, compressed_query, inputs[i], index_keys)
                    if layer > self.candidate_source >= 0:
                        size = text["candidate_block_size"]
                        allowed = {n: score for n, score in scores.items() if n // size in blocks[i]}
                    else:
                        allowed = scores
                    selected[i] = best(allowed, text["index_topk"])
                    if layer == self.candidate_source:
                        blocks[i] = kept_blocks(scores, text["candidate_block_size"], text["candidate_topk_blocks"])

                # In the decoder the keys of tokens before decoder_start are not there.
                seen = [window_keys[j] for j in range(i - text["sliding_window"] + 1, i + 1) if j in window_keys]
                if self.ratio(layer):
                    seen += [entries[n] for n in selected[i]]
                attended = self._attend(layer, i, compressed_query, torch.stack(seen), frequencies)

                # Each half is collapsed with the `pre` of the half before it.
                attention_pre, post, comb = self._mix(layer, "attn", streams[i])
                h = post[:, None] * attended + comb.T @ streams[i]
                next_pre, post, comb = self._mix(layer, "ffn", h)
                x = self.rms(attention_pre @ h, self.weight(layer, "ffn_norm.weight"))
                streams[i] = post[:, None] * self._feed_forward(layer, x) + comb.T @ h
                pre[i] = next_pre

        logits = torch.full((len(ids), V), math.nan, dtype=torch.float64)
        for i in streams:
            logits[i] = self.weights["head.weight"] @ self.rms(pre[i] @ streams[i], self.weights["norm.weight"])
        return logits

    def _mix(self, layer: int, half: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre [X], post [X] and comb [X from, X to] of the streams."""
        X, eps = self.text["hc_mult"], self.text["hc_eps"]
        base, scale = self.weight(layer, f"hc_{half}_base"), self.weight(layer, f"hc_{half}_scale")
        u = h.flatten()
        m = (self.weight(layer, f"hc_{half}_fn") @ u) / torch.sqrt((u * u).mean() + self.text["rms_norm_eps"])
        pre = torch.sigmoid(m[:X] * scale[0] + base[:X]) + eps
        post = 2 * torch.sigmoid(m[X : 2 * X] * scale[1] + base[X : 2 * X])
        comb = torch.softmax((m[2 * X :] * scale[2] + base[2 * X :]).reshape(X, X), dim=1) + eps
        comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
        for _ in range(self.text["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(dim=1, keepdim=True) + eps)
            comb = comb / (comb.sum(dim=0, keepdim=True) + eps)
        return pre, post, comb

    def _engram(self, layer: int, h: Tensor, rows: list[int]) -> Tensor:
        """Streams with what the token's n-grams add to them."""
        d, X = self.text["hidden_size"], self.text["hc_mult"]
        table = self.weight(layer, "engram.embed.weight")
        kv = self.weight(layer, "engram.wkv.weight") @ torch.cat([table[row] for row in rows])
        value = kv[X * d :]
        updated = []
        for m in range(X):
            query = self.rms(h[m], self.weight(layer, "engram.q_weight")[m])
            key = self.rms(kv[m * d : (m + 1) * d], self.weight(layer, "engram.k_weight")[m])
            gate = float((query * key).sum()) / math.sqrt(d)
            gate = (-1 if gate < 0 else 1) * math.sqrt(max(abs(gate), 1e-6))
            updated.append(h[m] + value / (1 + math.exp(-gate)))
        return torch.stack(updated)

    def _window_key(self, layer: int, x: Tensor, position: int, frequencies: Tensor) -> Tensor:
        key = self.rms(self.weight(layer, "attn.wkv.weight") @ x, self.weight(layer, "attn.kv_norm.weight"))
        return rotate(key, position, frequencies)

    def _compress(self, layer: int, inputs: Mapping[int, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Entries and index keys of the whole windows of the sequence."""
        r = self.ratio(layer)
        entries, index_keys = [], []
        for w in range(len(inputs) // r):
            tokens = [inputs[t] for t in range(r * w, r * w + r)]
            latent = torch.stack([self.weight(layer, "attn.compressor.wkv.weight") @ x for x in tokens])
            if r > 1:
                gates = torch.stack([self.weight(layer, "attn.compressor.wgate.weight") @ x for x in tokens])
                latent = (torch.softmax(gates, dim=0) * latent).sum(dim=0)
            else:
                latent = latent[0]
            latent = self.rms(latent, self.weight(layer, "attn.compressor.norm.weight"))
            index_key = self.rms(
                self.weight(layer, "attn.indexer.wk.weight") @ latent, self.weight(layer, "attn.indexer.k_norm.weight")
            )
            entries.append(rotate(latent, r * w, self.compress_frequencies))
            index_keys.append(rotate(index_key, r * w, self.compress_frequencies))
        return entries, index_keys

    def _index_scores(
        self, layer: int, position: int, compressed_query: Tensor, x: Tensor, index_keys: list[Tensor]
    ) -> dict[int, float]:
        """Score of each number the token may see."""
        Hi, width = self.text["index_n_heads"], self.text["index_head_dim"]
        visible = (position + 1) // self.ratio(layer)
        if visible == 0:
            return {}
        queries = (self.weight(layer, "attn.indexer.wq_b.weight") @ compressed_query).reshape(Hi, width)
        queries = rotate(queries, position, self.compress_frequencies)
        heads = self.weight(layer, "attn.indexer.weights_proj.weight") @ x
        products = torch.relu(torch.stack(index_keys[:visible]) @ queries.T)
        scores = (products * heads).sum(dim=1) * (width * Hi) ** -0.5
        return dict(enumerate(scores.tolist()))

    def _attend(self, layer: int, position: int, compressed_query: Tensor, keys: Tensor, frequencies: Tensor) -> Tensor:
        """Attention of a token over keys [K, W], which are the values too."""
        H, W, groups, rank = (self.text[k] for k in ("num_attention_heads", "head_dim", "o_groups", "o_lora_rank"))
        queries = (self.weight(layer, "attn.wq_b.weight") @ compressed_query).reshape(H, W)
        queries = rotate(queries, position, frequencies)
        shares = sink_softmax(queries @ keys.T * W**-0.5, self.weight(layer, "attn.attn_sink"))
        heads = rotate(shares @ keys, -position, frequencies)
        low = []
        for g in range(groups):
            group = heads[g * H // groups : (g + 1) * H // groups].flatten()
            low.append(self.weight(layer, "attn.wo_a.weight")[g * rank : (g + 1) * rank] @ group)
        return self.weight(layer, "attn.wo_b.weight") @ torch.cat(low)

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        gate = self.weight(layer, "ffn.gate.weight") @ x
        # Not torch's softplus, which is the identity above 20.
        scores = torch.sqrt(torch.logaddexp(gate, torch.zeros_like(gate)))
        biased = dict(enumerate((scores + self.weight(layer, "ffn.gate.bias")).tolist()))
        chosen = best(biased, self.text["num_experts_per_tok"])
        total = sum(scores[e] for e in chosen)
        y = torch.zeros_like(x)
        for e in chosen:
            share = scores[e] / total * self.text["routed_scaling_factor"]
            y = y + share * self._expert(layer, f"ffn.experts.{e}", x)
        if self.text["n_shared_experts"]:
            y = y + self._expert(layer, "ffn.shared_experts", x)
        return y

    def _expert(self, layer: int, name: str, x: Tensor) -> Tensor:
        limit = self.text["swiglu_limit"]
        g = torch.clamp(self.weight(layer, f"{name}.w1.weight") @ x, max=limit)
        u = torch.clamp(self.weight(layer, f"{name}.w3.weight") @ x, min=-limit, max=limit)
        return self.weight(layer, f"{name}.w2.weight") @ (g * torch.sigmoid(g) * u)


def latest(sources: Iterable[int], layer: int) -> int | None:
    """The most recent source at or before a layer."""
    return max((source for source in sources if source <= layer), default=None)


# Random models.


def random_text_config(**changes: Any) -> dict[str, Any]:
    """A text_config of a tiny model with a part of every kind."""
    text = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 40,
        "o_lora_rank": 12,
        "o_groups": 2,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 1.0,
        "rms_norm_eps": 1e-20,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 64,
        },
        "sliding_window": 16,
        "compress_ratios": [0, 0, 2, 2, 2, 1, 1, 1],
        "kv_source_layer_ids": [2, 5],
        "index_source_layer_ids": [2, 5, 6],
        "index_n_heads": 32,
        "index_head_dim": 16,
        "index_topk": 12,
        "candidate_source_layer_id": 5,
        "candidate_topk_blocks": 4,
        "candidate_block_size": 4,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "engram_layer_ids": [1, 3],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 53,
        "engram_n_heads": 2,
        "engram_head_dim": 32,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 61,
    }
    unknown = changes.keys() - text.keys() - {"engram_seed"}
    if unknown:
        raise KeyError(f"no such key: {sorted(unknown)}")
    return {**text, **changes}


def random_token_map(vocab_size: int, compressed_vocab_size: int, seed: int = 0) -> np.ndarray:
    """A map of token ids onto all of Engram's ids, int64 [V]."""
    rng = np.random.default_rng(seed)
    every = np.arange(compressed_vocab_size)
    again = rng.integers(0, compressed_vocab_size, vocab_size - compressed_vocab_size)
    return rng.permutation(np.concatenate([every, again])).astype(np.int64)


def random_weights(text: Text, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a model, float32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def put(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        weights[name] = (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        put(name, rows, columns, scale=columns**-0.5)

    def norm(name: str, *shape: int) -> None:
        put(name, *shape, scale=0.2, mean=1.0)

    d, X, H, W = text["hidden_size"], text["hc_mult"], text["num_attention_heads"], text["head_dim"]
    rank, groups, low = text["q_lora_rank"], text["o_groups"], text["o_lora_rank"]
    Hi, width = text["index_n_heads"], text["index_head_dim"]
    V, E, inner = text["vocab_size"], text["n_routed_experts"], text["moe_intermediate_size"]
    engram_layers = text.get("engram_layer_ids") or []
    primes = engram_primes(text) if engram_layers else {}

    put("embed.weight", V, d, scale=1.0)
    norm("norm.weight", d)
    linear("head.weight", V, d)
    for i in range(text["num_hidden_layers"]):
        layer = f"layers.{i}"
        norm(f"{layer}.attn_norm.weight", d)
        norm(f"{layer}.ffn_norm.weight", d)
        for half in ("attn", "ffn"):
            linear(f"{layer}.hc_{half}_fn", (2 + X) * X, X * d)
            put(f"{layer}.hc_{half}_base", (2 + X) * X, scale=0.1)
            put(f"{layer}.hc_{half}_scale", 3, scale=0.2, mean=1.0)

        put(f"{layer}.attn.attn_sink", H, scale=1.0)
        linear(f"{layer}.attn.wq_a.weight", rank, d)
        norm(f"{layer}.attn.q_norm.weight", rank)
        linear(f"{layer}.attn.wq_b.weight", H * W, rank)
        linear(f"{layer}.attn.wkv.weight", W, d)
        norm(f"{layer}.attn.kv_norm.weight", W)
        linear(f"{layer}.attn.wo_a.weight", groups * low, H * W // groups)
        linear(f"{layer}.attn.wo_b.weight", d, groups * low)
        if i in text["kv_source_layer_ids"]:
            linear(f"{layer}.attn.compressor.wkv.weight", W, d)
            norm(f"{layer}.attn.compressor.norm.weight", W)
            if text["compress_ratios"][i] > 1:
                linear(f"{layer}.attn.compressor.wgate.weight", W, d)
            linear(f"{layer}.attn.indexer.wk.weight", width, W)
            norm(f"{layer}.attn.indexer.k_norm.weight", width)
        if i in text["index_source_layer_ids"]:
            linear(f"{layer}.attn.indexer.wq_b.weight", Hi * width, rank)
            linear(f"{layer}.attn.indexer.weights_proj.weight", Hi, d)

        linear(f"{layer}.ffn.gate.weight", E, d)
        put(f"{layer}.ffn.gate.bias", E, scale=0.1)
        experts = {f"experts.{e}": inner for e in range(E)}
        if text["n_shared_experts"]:
            experts["shared_experts"] = inner * text["n_shared_experts"]
        for name, wide in experts.items():
            linear(f"{layer}.ffn.{name}.w1.weight", wide, d)
            linear(f"{layer}.ffn.{name}.w3.weight", wide, d)
            linear(f"{layer}.ffn.{name}.w2.weight", d, wide)

        if i in engram_layers:
            tables = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"]
            rows = sum(sum(order) for order in primes[i])
            put(f"{layer}.engram.embed.weight", rows, text["engram_head_dim"], scale=1.0)
            linear(f"{layer}.engram.wkv.weight", (X + 1) * d, tables * text["engram_head_dim"])
            norm(f"{layer}.engram.q_weight", X, d)
            norm(f"{layer}.engram.k_weight", X, d)
    return weights
