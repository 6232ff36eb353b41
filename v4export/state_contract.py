"""What each layer remembers between steps: one table that the model, the graph and the runtime go by.

A state tensor is a list of rows. A row stands for one token, or for ``every`` tokens that follow each other, and is
numbered accordingly. The graph reads rows and returns new ones; who calls it puts them in their places: row n at index
n, or at ``n % ring`` where only the last ``ring`` rows are kept. So a step copies nothing, and prefill in chunks of any
length leaves the state that single steps leave.

Rows that attention reads may be kept as E4M3: then a tensor of that type and one of multipliers take the place of one
of the activations' type, and a row is their product, ``SCALED`` columns to a multiplier. The last columns of keys,
which say where a token stands, are kept as they are, in a third tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from v4export.config import CSA, FULL, HCA, ModelConfig

#: Types that are not the activations'.
FLOAT32, E4M3 = "float32", "float8_e4m3fn"
_BYTES = {FLOAT32: 4, E4M3: 1}
#: Columns of a row of E4M3 that share a multiplier.
SCALED = 64
#: How the names of multipliers end, and those of rotated columns.
SCALE, ROTATED = "_scale", "_rotated"
#: Rows whose last columns are rotated and not rounded, as in DeepSeek's own serving code: in the trained example they
#: are a fifth of a row, and five sixths of what rounding all of it does to predictions.
_PARTLY_EXACT = ("latent", "window", "entry")


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state, [B, rows, width].

    Attributes:
        name: within its layer.
        width: of a row.
        every: tokens that a row stands for. A row is complete, and may be seen, once its last token has come.
        ring: rows that are kept, or None for all.
        dtype: float32 or E4M3; None is the activations' type.
        reads_oldest: whether a step reads the row whose place in the ring its own first row is to take, so that the new
            one must not be there before the step has ended.
    """

    name: str
    width: int
    every: int = 1
    ring: int | None = None
    dtype: str | None = None
    reads_oldest: bool = False

    @property
    def rows(self) -> str:
        """The name of the rows that it is a part of, or all of."""
        return self.name.removesuffix(SCALE).removesuffix(ROTATED)

    def complete(self, tokens: int) -> int:
        """Rows that so many tokens complete."""
        return tokens // self.every

    def stored(self, tokens: int) -> int:
        """Rows that are kept of so many tokens, those of a ring that none has taken among them."""
        return self.ring or self.complete(tokens)

    def reaches(self, tokens: int, held: int) -> bool:
        """Whether what is kept of ``held`` tokens has all that a step behind the first ``tokens`` of them reads."""
        if self.ring is None:
            return True
        oldest = tokens - self.ring + (0 if self.reads_oldest else 1)
        return max(0, oldest) >= held - self.ring

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
    """The state of one layer; reasoning layers, or the one that drafts, come after the model's own."""
    if layer >= config.num_layers:
        return state_tensors(config.drafter if config.drafts else config.thinker, layer - config.num_layers)
    kept = _attention(config, layer)
    if config.state_fp8:
        kept = tuple(part for t in kept for part in ((t,) if t.dtype else _narrow(t, exact_columns(config, t.name))))
    return (*kept, *_engram(config, layer))


def _narrow(tensor: StateTensor, exact: int) -> Iterator[StateTensor]:
    """What takes the place of rows of the activations' type: E4M3, multipliers, and the last columns as they are."""
    width = tensor.width - exact
    yield replace(tensor, width=width, dtype=E4M3)
    yield replace(tensor, name=tensor.name + SCALE, width=-(-width // SCALED), dtype=FLOAT32)
    if exact:
        yield replace(tensor, name=tensor.name + ROTATED, width=exact)


def exact_columns(config: ModelConfig, name: str) -> int:
    """How many last columns of rows of a name are not rounded."""
    return config.qk_rope_head_dim if name in _PARTLY_EXACT else 0


def kept_as(config: ModelConfig, *names: str) -> list[str]:
    """The tensors that rows of these names are kept in."""
    if not config.state_fp8:
        return [*names]
    ends = {name: ["", SCALE, *([ROTATED] if name in _PARTLY_EXACT else [])] for name in names}
    return [name + end for name in names for end in ends[name]]


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
    return tuple(t for t in tensors if t.rows != "window") if first else ()


def may_skip_decoder(config: ModelConfig) -> bool:
    """Whether tokens can be remembered without passing the decoder: whatever only it knows of them is in windows."""
    layers = range(config.state_layers)
    left = [set(state_tensors(config, i)) - set(remembered(config, i)) for i in layers]
    return any(map(config.is_decoder, layers)) and all(t.rows == "window" for some in left for t in some)


def _compressor(entry: str, rows: str, width: int, ratio: int, halves: int) -> tuple[StateTensor, StateTensor]:
    """Finished entries, and the projections [key | gate] of the tokens that an unfinished one is pooled from.

    With overlap (``halves`` = 2) an entry is pooled from its own tokens' second halves and the first halves of those
    before, so twice as many tokens are kept.
    """
    open_rows = StateTensor(rows, 2 * halves * width, ring=halves * ratio, dtype=FLOAT32)
    return StateTensor(entry, width, every=ratio), open_rows


def _all(config: ModelConfig) -> Iterator[StateTensor]:
    layers = range(config.state_layers + config.drafts)
    return (tensor for layer in layers for tensor in state_tensors(config, layer))


def bytes_per_token(config: ModelConfig, itemsize: int = 2) -> float:
    """Bytes by which a sequence's state grows with each token, the activations' type having ``itemsize`` bytes."""
    total = sum(row_bytes(t, itemsize) / t.every for t in _all(config) if t.ring is None)
    return int(total) if total == int(total) else total


def fixed_bytes(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of a sequence's state that do not depend on its length."""
    return sum(row_bytes(t, itemsize) * t.ring for t in _all(config) if t.ring)


def layer_bytes(config: ModelConfig, layer: int, tokens: int, itemsize: int = 2) -> int:
    """Bytes of one layer's state of a sequence of so many tokens: rows of all that are complete, and whole rings."""
    return sum(row_bytes(t, itemsize) * t.stored(tokens) for t in state_tensors(config, layer))


def row_bytes(tensor: StateTensor, itemsize: int) -> int:
    """Bytes of one row."""
    return tensor.width * (itemsize if tensor.dtype is None else _BYTES[tensor.dtype])
