"""Tokens to row numbers: hashes of the last 2 .. N compressed ids, in NumPy, for any chunking of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from v4export.config import Engram
from v4export.config.hashes import NO_ROW, LayerHash, layouts
from v4export.errors import BadInput


class Hasher:
    """Row numbers of every Engram layer.

    ``mix = c[t] * m[0]``; for n = 2 .. N: ``mix ^= c[t-n+1] * m[n-1]``, and each head's row is ``mix mod prime`` after
    the rows of the hashes before it. What is before the first token counts as the pad token.

    A *history* is all that is left of a sequence: int64 [B, N-1], compressed ids of its last tokens as the next token
    sees them, the newest last, pad where it must not see them.

    Attributes:
        token_map: int32 [V], token id -> compressed id.
        pad: compressed id of the pad token.
        compressed_vocab: how many compressed ids there are.
        layers: layer -> its hashes.
    """

    def __init__(
        self, token_map: np.ndarray, pad: int, compressed_vocab: int, layers: Mapping[int, LayerHash], heads: int
    ) -> None:
        self.token_map, self.pad, self.compressed_vocab = token_map, pad, compressed_vocab
        self.layers, self.heads = layers, heads
        (self._back,) = {len(layer.multipliers) - 1 for layer in layers.values()}
        # [(N-1), heads] of each, as the loop over n-gram lengths takes them
        self._grids = {
            number: tuple(np.array(part, np.int64).reshape(self._back, heads) for part in (layer.primes, layer.offsets))
            for number, layer in layers.items()
        }

    @staticmethod
    def of(engram: Engram, token_map: np.ndarray) -> Hasher:
        """The hashes of a model.

        Args:
            engram: says which.
            token_map: int32 [V] from ``vocabulary``.

        Raises:
            BadInput: the map has ids that the model does not, or no pad token.
        """
        if not token_map.size or token_map.min() < 0 or token_map.max() >= engram.compressed_vocab:
            raise BadInput(
                "the token map does not match the Engram tables",
                f"{token_map.size} tokens, ids have to be 0 to {engram.compressed_vocab - 1}",
                "make the map from the tokenizer of the same checkpoint",
            )
        if not 0 <= engram.pad_token_id < token_map.size:
            raise BadInput(
                "Engram's pad token is not in the vocabulary",
                f"pad_token_id {engram.pad_token_id}, vocabulary of {token_map.size}",
                "correct config.json",
            )
        pad = int(token_map[engram.pad_token_id])
        return Hasher(token_map, pad, engram.compressed_vocab, layouts(engram), engram.heads)

    def empty_history(self, batch: int) -> np.ndarray:
        """The history of sequences without tokens: int64 [B, N-1]."""
        return np.full((batch, self._back), self.pad, np.int64)

    def rows(
        self,
        tokens_BS: np.ndarray,
        history_BN: np.ndarray,
        lengths_B: np.ndarray | None = None,
        masked: np.ndarray | None = None,
        starts: np.ndarray | None = None,
    ) -> tuple[dict[int, np.ndarray], np.ndarray]:
        """Row numbers of new tokens.

        Args:
            tokens_BS: token ids [B, S].
            history_BN: of what is before them [B, N-1].
            lengths_B: how many of the S are tokens; what is right of them is padding, and advances nothing. None: all.
            masked: bool [B, S], tokens that are no text (image patches): they look nothing up, and whoever looks back
                sees pad in their place and in that of everything further back.
            starts: bool [B, S], tokens that begin a segment: whoever looks back across the beginning sees pad.

        Returns:
            Layer -> int64 [B, S, (N-1) * heads], ``NO_ROW`` for masked tokens and padding; and the new history.

        Raises:
            BadInput: token ids outside the map, or arrays whose shapes or values do not fit together.
        """
        tokens = _expect("tokens", tokens_BS, "iu", (None, None))
        batch, steps = tokens.shape
        history = _expect("history", history_BN, "iu", (batch, self._back))
        _within("a history holds compressed ids that do not exist", history, self.compressed_vocab)
        lengths = np.full(batch, steps) if lengths_B is None else _expect("lengths", lengths_B, "iu", (batch,))
        _within("lengths do not fit the tokens", lengths, steps + 1)
        dark, begin = (
            np.zeros((batch, steps), bool) if flags is None else _expect(name, flags, "b", (batch, steps))
            for name, flags in (("masked", masked), ("starts", starts))
        )
        text = (np.arange(steps) < lengths[:, None]) & ~dark
        _within("token ids are not in the vocabulary", tokens[text], self.token_map.size)
        ids = np.full((batch, steps), self.pad, np.int64)
        ids[text] = self.token_map[tokens[text]]

        # Token t stands at place N-1+t, behind the history. floor[:, t+1] is the first place that it may look back to.
        seen = np.concatenate([history.astype(np.int64), ids], axis=1)
        place = np.arange(self._back, self._back + steps)
        floor = np.zeros((batch, steps + 1), np.int64)
        floor[:, 1:] = np.where(dark, place + 1, np.where(begin, place, 0))
        floor = np.maximum.accumulate(floor, axis=1)
        context = [ids]
        for distance in range(1, self._back + 1):
            there = seen[:, self._back - distance : self._back - distance + steps]
            context.append(np.where(place - distance >= floor[:, 1:], there, self.pad))
        rows = {layer: self._hash(layer, context, text) for layer in self.layers}

        kept = lengths[:, None] + np.arange(self._back)
        visible = kept >= np.take_along_axis(floor, lengths[:, None].astype(np.int64), axis=1)
        return rows, np.where(visible, np.take_along_axis(seen, kept, axis=1), self.pad)

    def _hash(self, layer: int, context: list[np.ndarray], text: np.ndarray) -> np.ndarray:
        """Rows [B, S, (N-1) * heads]; ``context`` [N] of [B, S]: the tokens, then those so far before them."""
        primes, offsets = self._grids[layer]
        multipliers = self.layers[layer].multipliers
        out = np.empty((*text.shape, self._back, self.heads), np.int64)
        mix = context[0] * multipliers[0]
        for i in range(self._back):
            mix = mix ^ (context[i + 1] * multipliers[i + 1])
            out[:, :, i] = mix[..., None] % primes[i] + offsets[i]
        out[~text] = NO_ROW
        return out.reshape(*text.shape, self._back * self.heads)


def _expect(name: str, value: Any, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
    array = np.asarray(value)
    fits = array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
    if array.dtype.kind not in kinds or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise BadInput(
            f"{name} of an Engram lookup are not what they have to be",
            f"{array.dtype} {list(array.shape)}, expected {'bool' if kinds == 'b' else 'integers'} [{wanted}]",
            "pass one row a sequence, and a history from empty_history or from the step before",
        )
    return array


def _within(what: str, values: np.ndarray, limit: int) -> None:
    wrong = values[(values < 0) | (values >= limit)]
    if wrong.size:
        found = ", ".join(str(value) for value in np.unique(wrong)[:5])
        raise BadInput(what, f"{found}; they have to be 0 to {limit - 1}", "use the tokenizer and state of this model")
