"""Engram's part of the vocabulary, below a layer.

Released by DeepSeek with V4.1. The convolution is that of the paper's form, one filter a channel of every stream.
"""

from __future__ import annotations

from v4export.checkpoint.table import Table
from v4export.config import Engram, ModelConfig


def _engram(config: ModelConfig) -> Engram:
    assert config.engram is not None
    return config.engram


def _streams(config: ModelConfig) -> int:
    return config.hyper.streams if config.hyper else 1


#: A key for each stream and one value for all; norms of streams and keys.
MEMORY: Table = {
    "engram.wkv.weight": (lambda c: ((_streams(c) + 1) * c.hidden_size, _engram(c).row_dim), "linear"),
    "engram.q_weight": (lambda c: (_streams(c), c.hidden_size), "norm"),
    "engram.k_weight": (lambda c: (_streams(c), c.hidden_size), "norm"),
}
CONVOLUTION: Table = {
    "engram.conv.norm": (lambda c: (_streams(c), c.hidden_size), "norm"),
    "engram.conv.weight": (lambda c: (_streams(c) * c.hidden_size, _engram(c).kernel), "convolution"),
}


def rows_table(rows: int) -> Table:
    """The table that is looked up, of so many rows."""
    return {"engram.embed.weight": (lambda c: (rows, _engram(c).width), "engram_table")}
