"""What each layer remembers between steps: one table that the model, the graph and the runtime go by.

A state tensor is a list of rows. A row stands for one token, or for ``every`` tokens that follow each other, and is
numbered accordingly. The graph reads rows and returns new ones; who calls it puts them in their places: row n at index
n, or at ``n % ring`` where only the last ``ring`` rows are kept. So a step copies nothing, and prefill in chunks of any
length leaves the state that single steps leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from v4export.config import CSA, FULL, HCA, ModelConfig


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state, [B, rows, width].

    Attributes:
        name: within its layer.
        width: of a row.
        every: tokens that a row stands for. A row is complete, and may be seen, once its last token has come.
        ring: rows that are kept, or None for all.
        float32: whatever the type of activations.
        reads_oldest: whether a step reads the row whose place in the ring its own first row is to take, so that the new
            one must not be there before the step has ended.
    """

    name: str
    width: int
    every: int = 1
    ring: int | None = None
    float32: bool = False
    reads_oldest: bool = False

    def complete(self, tokens: int) -> int:
        """Rows that so many tokens complete."""
        return tokens // self.every

    def returned(self, steps: int) -> int:
        """New rows that a step of so many tokens returns, the first being that of its first token.

        Enough for every row that the step can complete; those it does not complete are to be dropped.
        """
        return -(-steps // self.every)

    @property
    def held_dim(self) -> int | str:
        """Size, or name of the dynamic dimension, of the rows a graph reads."""
        return self.ring or ("T" if self.every == 1 else f"T/{self.every}")

    @property
    def returned_dim(self) -> str:
        """Name of the dynamic dimension of the rows a graph returns."""
        return "S" if self.every == 1 else f"S/{self.every}"


def state_tensors(config: ModelConfig, layer: int) -> tuple[StateTensor, ...]:
    """The state of one layer; reasoning layers come after the model's own."""
    if layer >= config.num_layers:
        return state_tensors(config.thinker, layer - config.num_layers)
    return (*_attention(config, layer), *_engram(config, layer))


def _attention(config: ModelConfig, layer: int) -> tuple[StateTensor, ...]:
    c, index = config.compressed, config.indexer
    if c is None:
        latent = StateTensor("latent", config.latent_dim)
        return (latent, StateTensor("index_key", index.head_dim)) if index else (latent,)
    window = StateTensor("window", c.head_dim, ring=c.window)
    kind, ratio = c.layers[layer], c.ratios[layer]
    if kind == HCA:
        return window, *_compressor("entry", "open", c.head_dim, ratio, 1)
    if kind == CSA:
        assert index is not None
        keys = _compressor("index_key", "index_open", index.head_dim, ratio, 2)
        return window, *_compressor("entry", "open", c.head_dim, ratio, 2), *keys
    if kind == FULL:
        assert index is not None
        entry, open_rows = _compressor("entry", "open", c.head_dim, ratio, 1)
        made_of = (open_rows,) if ratio > 1 else ()
        return window, entry, *made_of, StateTensor("index_key", index.head_dim, every=ratio)
    return (window,)


def _engram(config: ModelConfig, layer: int) -> tuple[StateTensor, ...]:
    """What a convolution needs of earlier tokens. Which tokens they were, whoever looks rows up has to know."""
    e = config.engram
    if e is None or not e.kernel or not config.has_engram(layer):
        return ()
    streams = config.hyper.streams if config.hyper else 1
    reach = (e.kernel - 1) * e.dilation
    return (StateTensor("engram", streams * config.hidden_size, ring=reach, reads_oldest=True),)


def remembered(config: ModelConfig, layer: int) -> tuple[StateTensor, ...]:
    """Of a layer's state what a step returns whose tokens do not pass the decoder: all before it, and its entries."""
    tensors = state_tensors(config, layer)
    if not config.is_decoder(layer):
        return tensors
    first = config.compressed and config.compressed.shared and layer == config.compressed.shared.decoder
    return tuple(t for t in tensors if t.name != "window") if first else ()


def may_skip_decoder(config: ModelConfig) -> bool:
    """Whether tokens can be remembered without passing the decoder: whatever only it knows of them is in windows."""
    layers = range(config.state_layers)
    left = [set(state_tensors(config, i)) - set(remembered(config, i)) for i in layers]
    return any(map(config.is_decoder, layers)) and all(t.name == "window" for some in left for t in some)


def _compressor(entry: str, rows: str, width: int, ratio: int, halves: int) -> tuple[StateTensor, StateTensor]:
    """Finished entries, and the projections [key | gate] of the tokens that an unfinished one is pooled from.

    With overlap (``halves`` = 2) an entry is pooled from its own tokens' second halves and the first halves of those
    before, so twice as many tokens are kept.
    """
    open_rows = StateTensor(rows, 2 * halves * width, ring=halves * ratio, float32=True)
    return StateTensor(entry, width, every=ratio), open_rows


def _all(config: ModelConfig) -> Iterator[StateTensor]:
    return (tensor for layer in range(config.state_layers) for tensor in state_tensors(config, layer))


def bytes_per_token(config: ModelConfig, itemsize: int = 2) -> float:
    """Bytes by which a sequence's state grows with each token, the activations' type having ``itemsize`` bytes."""
    total = sum(t.width * (4 if t.float32 else itemsize) / t.every for t in _all(config) if t.ring is None)
    return int(total) if total == int(total) else total


def fixed_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of a sequence's state that do not depend on its length."""
    return sum(t.width * (4 if t.float32 else itemsize) * t.ring for t in _all(config) if t.ring)
