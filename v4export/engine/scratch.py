"""Memory that a step of an engine takes for what its tokens gather and score, which bounds how many it should have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from v4export.config import HCA, WINDOW, ModelConfig
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


def scratch(config: ModelConfig, max_seq_len: int, itemsize: int = 2) -> list[Scratch]:
    """The places that take most, of all kinds of layer of a model.

    Args:
        config: the model.
        max_seq_len: tokens held.
        itemsize: bytes of an activation.
    """
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
    compressed, index = config.compressed, config.indexer
    kinds = set(compressed.layers) if compressed else {WINDOW}
    for kind in sorted(kinds):
        seen = tokens
        if compressed:
            seen = compressed.window + (0 if kind == WINDOW else tokens // compressed.ratio(kind))
        if index and (not compressed or kind not in (WINDOW, HCA)):
            keys = tokens // compressed.ratio(kind) if compressed else tokens
            selected = min(index.top_k, max(1, keys))
            width = compressed.head_dim if compressed else config.latent_dim
            yield _scores("index scores", index.num_heads * max(1, keys))
            yield _scores("selected rows", selected * width)
            seen = selected + (compressed.window if compressed else 0)
        yield _scores("attention scores", config.num_heads * seen)


def _scores(what: str, elements: int) -> Scratch:
    return Scratch(what, elements * _FLOAT32, elements)
