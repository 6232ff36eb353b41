"""Small Engram memories, tables on disk, and the hashes once more: one token at a time, with Python's own integers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from v4export.checkpoint.tensor import DTYPES, StoredTensor
from v4export.config import Engram
from v4export.config.hashes import NO_ROW, LayerHash

SMALL = Engram(layers=(1, 4), max_order=4, heads=3, width=64, buckets=50, compressed_vocab=23, pad_token_id=2)
#: Token id -> compressed id, of a vocabulary of 40.
TOKEN_MAP = np.array([(7 * i) % 23 for i in range(40)], np.int32)
PAD = int(TOKEN_MAP[SMALL.pad_token_id])


def store(file: Path, name: str, array: np.ndarray, at: int = 100) -> StoredTensor:
    """Put an array into a file, behind some bytes that are not its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.truncate(at)
        stream.seek(at)
        stream.write(array.tobytes())
    dtype = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    return StoredTensor(name, file, dtype, array.shape, at, array.nbytes)


def fp8_table(folder: Path, rows: int, width: int = 64, seed: int = 0) -> tuple[StoredTensor, StoredTensor]:
    """A table of every finite code, with multipliers over their whole range but what overflows float32."""
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.array([c for c in range(256) if c & 127 != 127], np.uint8), (rows, width))
    scales = rng.integers(0, 246, (rows, width // 32), dtype=np.uint8)
    return (
        store(folder / f"data{seed}.bin", "embed.weight", codes.view(ml_dtypes.float8_e4m3fn)),
        store(folder / f"scale{seed}.bin", "embed.scale", scales.view(ml_dtypes.float8_e8m0fnu), at=13),
    )


def plain_rows(
    layer: LayerHash, heads: int, tokens: Sequence[int], masked: Sequence[bool] = (), starts: Sequence[bool] = ()
) -> list[list[int]]:
    """Rows of a whole sequence, by looking back from every token until something is in the way."""
    out = []
    for t, token in enumerate(tokens):
        if masked and masked[t]:
            out.append([NO_ROW] * len(layer.primes))
            continue
        seen, blocked = [int(TOKEN_MAP[token])], False
        for back in range(1, len(layer.multipliers)):
            there = t - back
            blocked = blocked or there < 0 or bool(starts and starts[there + 1]) or bool(masked and masked[there])
            seen.append(PAD if blocked else int(TOKEN_MAP[tokens[there]]))
        mix, rows, first = seen[0] * layer.multipliers[0], [], 0
        for back in range(1, len(layer.multipliers)):
            mix ^= seen[back] * layer.multipliers[back]
            for prime in layer.primes[(back - 1) * heads : back * heads]:
                rows.append(mix % prime + first)
                first += prime
        out.append(rows)
    return out
