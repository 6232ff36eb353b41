"""Models of DeepSeek-V4.1 beside a literal implementation of its equations, which shares no code with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import literal_v41
import numpy as np
import torch
from literal_v41 import LiteralV41

from v4export.checkpoint.aliases import canonical, native
from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.config.readers import read_config, to_hub_config
from v4export.engram.hashing import Hasher
from v4export.engram.vocabulary import read_token_map
from v4export.model import Transformer
from v4export.model.load import load_transformer


def hub_config(text: dict[str, Any]) -> dict[str, Any]:
    """A config.json around the literal model's keys."""
    scaling = text["rope_scaling"]
    keys = text | {"rope_scaling": scaling and scaling | {"rope_type": "yarn"}, "max_position_embeddings": 4096}
    return {"model_type": "deepseek_v41", "text_config": keys}


class TableLookup:
    """Rows of tables in memory, hashed by the project."""

    def __init__(self, hasher: Hasher, tables: dict[int, np.ndarray]) -> None:
        self.hasher, self.tables = hasher, tables

    def rows(
        self, tokens_BS: np.ndarray, history_BN: np.ndarray, lengths_B: np.ndarray
    ) -> tuple[dict[int, np.ndarray], np.ndarray]:
        numbers, history_BN = self.hasher.rows(tokens_BS, history_BN, lengths_B)
        found = {layer: self.tables[layer][rows] for layer, rows in numbers.items()}
        return {layer: rows.reshape(*tokens_BS.shape, -1) for layer, rows in found.items()}, history_BN


@dataclass
class Pair:
    """A literal model and the project's, with the same weights."""

    literal: LiteralV41
    model: Transformer
    lookup: TableLookup | None

    def reference(self, ids: np.ndarray, decoder_start: int = 0) -> np.ndarray:
        """The literal model's logits [n, V]."""
        return self.literal.logits(ids.tolist(), decoder_start).numpy()


def pair(seed: int = 0, **changes: Any) -> Pair:
    """Both models of a random tiny configuration."""
    text = literal_v41.random_text_config(**changes)
    weights = literal_v41.random_weights(text, seed)
    config = read_config(hub_config(text))
    by_name = {canonical(name, True): torch.as_tensor(value).float() for name, value in weights.items()}
    words, lookup = None, None
    if config.engram:
        words = literal_v41.random_token_map(config.vocab_size, config.engram.compressed_vocab, seed)
        tables = {i: by_name[f"model.layers.{i}.engram.embed.weight"].numpy() for i in config.engram.layers}
        lookup = TableLookup(Hasher.of(config.engram, words.astype(np.int32)), tables)
    model = load_transformer(config, lambda name: by_name[name])
    return Pair(LiteralV41(text, weights, words), model, lookup)


def literal_of(folder: Path) -> LiteralV41:
    """The literal model of a checkpoint on disk."""
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    weights = {native(name): weight.decode() for name, weight in audit(checkpoint).weights.items()}
    words = read_token_map(folder, config.engram, config.vocab_size) if config.engram else None
    return LiteralV41(to_hub_config(config)["text_config"], weights, words)
