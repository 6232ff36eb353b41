"""Memory that a step of an engine takes for what its tokens gather and score, which bounds how many it should have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from v4export.config import HCA, ModelConfig
from v4export.plugins.limits import MAX_ELEMENTS
from v4export.plugins.moe_experts.onnx import parts

_FLOAT32 = 4


@dataclass(frozen=True)
class Scratch:
    """What one token of a step takes at some place of the graph.

    Attributes:
        what: for a message.
        bytes: held there at once.
        elements: of the largest tensor.
    """

    what: str
    bytes: int
    elements: int

    @property
    def most_tokens(self) -> int:
        """Tokens of a step, of all sequences, beyond which a tensor is larger than TensorRT takes."""
        return MAX_ELEMENTS // self.elements


def scratch(config: ModelConfig, max_seq_len: int, itemsize: int = 2, plugins: bool = False) -> list[Scratch]:
    """The places that take most, of all kinds of layer of a model.

    Args:
        config: the model.
        max_seq_len: tokens held.
        itemsize: bytes of an activation.
        plugins: whether ops are kernels, which hand each other what they have summed, and gather nothing.
    """
    if plugins:
        return list(_between_kernels(config, max_seq_len))
    found = list(_attention(config, max_seq_len))
    if config.moe_layers:
        # The body of moe_experts holds the matrices of every token's experts at once, dequantised.
        shape = (config.moe_intermediate_size, config.hidden_size)
        matrix = config.experts_per_token * shape[0] * shape[1]
        pieces = min(parts(config.num_experts, *shape), parts(config.num_experts, *reversed(shape)))
        found.append(Scratch("gathered experts", 3 * matrix * itemsize, -(-matrix // pieces)))
    return found


def _attention(config: ModelConfig, tokens: int) -> Iterator[Scratch]:
    """Scores, and rows that each token gathers for itself; both are float32."""
    c, index = config.compressed, config.indexer
    kinds = set(zip(c.layers, c.ratios, strict=True)) if c else {("", 1)}
    for kind, ratio in sorted(kinds):
        keys = max(1, tokens // ratio) if ratio else 0
        seen = keys + (c.window if c else 0)
        if index and keys and kind != HCA:
            selected = min(index.top_k, keys)
            width = c.head_dim if c else config.latent_dim
            yield _scores("index scores", index.num_heads * keys)
            yield _scores("selected rows", selected * width)
            seen = selected + (c.window if c else 0)
        yield _scores("attention scores", config.num_heads * seen)


def _between_kernels(config: ModelConfig, tokens: int) -> Iterator[Scratch]:
    """What kernels leave for the next one of their op, float32: a share of attention for each head where there are
    many tokens, and few tokens' shares are few; an expert's output; a score of each key.
    """
    c = config.compressed
    yield _scores("attention shares", config.num_heads * (c.head_dim if c else config.kv_lora_rank))
    if config.moe_layers:
        yield _scores("experts' outputs", config.experts_per_token * config.hidden_size)
    if config.indexer:
        ratios = [ratio for ratio in c.ratios if ratio] if c else [1]
        yield _scores("index scores", max(1, tokens // min(ratios)))


def _scores(what: str, elements: int) -> Scratch:
    return Scratch(what, elements * _FLOAT32, elements)
