"""Engram rows of new tokens, from the tables on disk; also begun ahead, while the graph still runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from v4export.engram.hashing import Hasher
from v4export.engram.table import Table
from v4export.errors import BadInput

Rows = tuple[dict[int, np.ndarray], np.ndarray]


class EngramFeed:
    """What a graph with Engram layers takes beside its tokens. A context manager; ``close`` ends its thread.

    Args:
        hasher: finds the rows.
        tables: layer -> table; empty where tables are part of the graph, which takes numbers of rows.
        dtype: of the rows that the graph takes.

    Raises:
        BadInput: layers or numbers of rows of the two differ.
    """

    def __init__(self, hasher: Hasher, tables: Mapping[int, Table], dtype: npt.DTypeLike = np.float32) -> None:
        expected = {layer: hashes.rows for layer, hashes in hasher.layers.items()}
        found = {layer: table.rows for layer, table in tables.items()}
        if tables and found != expected:
            raise BadInput(
                "the Engram tables do not match the hashes",
                f"layer -> rows: {found}, expected {expected}",
                "take config.json, tokenizer.json and the tables from the same checkpoint",
            )
        self.hasher, self.tables, self.dtype = hasher, tables, np.dtype(dtype)
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: tuple[tuple[Any, ...], Future[Rows]] | None = None

    def rows(
        self,
        tokens_BS: np.ndarray,
        history_BN: np.ndarray,
        lengths_B: np.ndarray | None = None,
        masked: np.ndarray | None = None,
        starts: np.ndarray | None = None,
    ) -> Rows:
        """Rows of new tokens: those that ``prefetch`` has begun with equal arguments, else from the tables now.

        Args:
            tokens_BS, history_BN, lengths_B, masked, starts: see ``Hasher.rows``.

        Returns:
            Layer -> [B, S, (N-1) * heads * width] of the feed's type, zeros for masked tokens and padding; without
            tables int64 [B, S, (N-1) * heads], any for padding. And the new history.

        Raises:
            BadInput: see ``Hasher.rows`` and ``Table.gather``; also what a prefetch has met.
        """
        arguments = (tokens_BS, history_BN, lengths_B, masked, starts)
        ahead, self._ahead = self._ahead, None
        if ahead and all(_equal(mine, yours) for mine, yours in zip(ahead[0], arguments, strict=True)):
            return ahead[1].result()
        if ahead:
            ahead[1].cancel()
        return self._compute(*arguments)

    def prefetch(
        self,
        tokens_BS: np.ndarray,
        history_BN: np.ndarray,
        lengths_B: np.ndarray | None = None,
        masked: np.ndarray | None = None,
        starts: np.ndarray | None = None,
    ) -> None:
        """Begin what ``rows`` with equal arguments will be asked for; drops what was begun before."""
        if self._ahead:
            self._ahead[1].cancel()
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "engram")
        # The caller may write over its arrays in the meantime.
        arguments = tuple(
            None if array is None else np.array(array) for array in (tokens_BS, history_BN, lengths_B, masked, starts)
        )
        self._ahead = arguments, self._worker.submit(self._compute, *arguments)

    def close(self) -> None:
        """End the thread, and close the tables."""
        self._ahead = None
        if self._worker:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        for table in self.tables.values():
            table.close()

    def __enter__(self) -> EngramFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _compute(self, *arguments: Any) -> Rows:
        numbers, history = self.hasher.rows(*arguments)
        if not self.tables:
            return {layer: rows.clip(min=0) for layer, rows in numbers.items()}, history
        found = {layer: self.tables[layer].gather(rows, self.dtype) for layer, rows in numbers.items()}
        # [B, S, rows, width] to [B, S, rows * width]
        flat = {layer: rows.reshape(*rows.shape[:2], math.prod(rows.shape[2:])) for layer, rows in found.items()}
        return flat, history


def _equal(mine: np.ndarray | None, yours: np.ndarray | None) -> bool:
    return mine is yours if mine is None or yours is None else np.array_equal(mine, yours)
