"""What an Engram layer should have been given: rows of the checkpoint's own tables, hashed anew.

Read from the checkpoint and its tokenizer, never from what the bundle says of them: a bundle that points at the wrong
rows, or hashes with another map, would agree with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import Engram, ModelConfig
from v4export.engram.files import EngramFiles
from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.graphs.export import engram_tables
from v4export.graphs.shards import numpy_dtype
from v4export.precision import Precision


class EngramReference:
    """The look-ups of whole sequences.

    Args:
        config: the model.
        weights: of the audited checkpoint.
        precision: of the graph, whose activations rows have the type of.
        token_map: token id -> compressed id, of the checkpoint's tokenizer.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Weight], precision: Precision, token_map: np.ndarray
    ) -> None:
        assert config.engram is not None
        self.inside, self.dtype = config.engram.inside, numpy_dtype(precision.activations)
        self.hasher = Hasher.of(config.engram, token_map)
        self.tables = {layer: Table(*stored) for layer, stored in engram_tables(weights).items()}

    def rows(self, layer: int, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """What a layer looks up for tokens of a sequence that begins with others.

        Returns:
            [n, W]; numbers of rows [n, K] where tables are inside the graph.
        """
        sequence = np.concatenate([before, tokens])[None]
        numbers, _ = self.hasher.rows(sequence, self.hasher.empty_history(1))
        own = numbers[layer][0, len(before) :]
        if self.inside:
            return own
        return self.tables[layer].gather(own, self.dtype).reshape(len(tokens), -1).astype(np.float32)


def engram_faults(
    folder: Path, engram: Engram, weights: Mapping[str, Weight], token_map: np.ndarray
) -> tuple[str, ...]:
    """What a bundle says of its look-up that the checkpoint and its tokenizer do not, a line each."""
    files, wanted = EngramFiles.read(folder), Hasher.of(engram, token_map)
    wrong = []
    if not np.array_equal(files.hasher.token_map, token_map) or files.hasher.pad != wanted.pad:
        wrong.append("engram.map is not that of the checkpoint's tokenizer")
    if dict(files.hasher.layers) != dict(wanted.layers):
        wrong.append("engram.json has other hashes than the configuration")
    tables = {} if engram.inside else engram_tables(weights)
    if files.tables.keys() != tables.keys():
        wrong.append(f"engram.json has tables of layers {[*files.tables]}, not {[*tables]}")
    for layer in files.tables.keys() & tables.keys():
        for mine, stored in zip(files.tables[layer], tables[layer], strict=True):
            if _place(mine) != _place(stored):
                here, there = _place(mine), _place(stored)
                wrong.append(f"the Engram table of layer {layer} is read at {here}, and lies at {there}")
    return tuple(wrong)


def _place(tensor: StoredTensor | None) -> tuple[str, int, int, str] | None:
    return None if tensor is None else (tensor.file.name, tensor.offset, tensor.nbytes, tensor.dtype)
