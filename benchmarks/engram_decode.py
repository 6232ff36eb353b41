"""What part of a token's time Engram's look-up takes on a CPU, with and without reading ahead.

The model is the one of the other tables with two Engram layers of DeepSeek-V4.1's width: 24 rows of 256 a layer and
token, FP8 with a multiplier per 32. Its tables are 4 GB on disk. Needs a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from engines import THREADS
from page import PAGE, replace_between, row
from subject import MAX_SEQ_LEN, subject

from v4export import api
from v4export.checkpoint.index import INDEX
from v4export.checkpoint.synth import synth
from v4export.config import Engram, ModelConfig
from v4export.config.hashes import layouts
from v4export.config.readers import to_hub_config
from v4export.engram.files import load_feed
from v4export.engram.vocabulary import compress
from v4export.runtime.onnx import OnnxExecutor

BEGIN, END = "<!-- measured: engram in a step -->", "<!-- end: engram in a step -->"
WIDTH, BLOCK = 256, 32
#: 24 hashes a layer, two layers: 4 GB with multipliers.
BUCKETS = 4 * (1 << 30) // (2 * 24 * (WIDTH + WIDTH // BLOCK))
HELD, TOKENS, PROMPT, CHUNK = 512, 48, 2048, 512


def model(words: int) -> ModelConfig:
    """The subject with Engram."""
    engram = Engram((1, 6), max_order=4, heads=8, width=WIDTH, buckets=BUCKETS, compressed_vocab=words, pad_token_id=2)
    return replace(subject(), family="v4x", engram=engram)


def checkpoint(folder: Path) -> Path:
    """The subject's checkpoint with a shard of Engram's tensors, tables of random bytes."""
    from tokenizers import Tokenizer

    path = synth(subject(), folder / "hub")
    plain = subject()
    words = compress(Tokenizer.from_file(str(path / "tokenizer.json")), plain.vocab_size, 2)[1]
    config = model(words)
    assert config.engram is not None
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[str, list[int]]] = {}
    for layer, hashes in layouts(config.engram).items():
        name = f"model.layers.{layer}.engram."
        tensors |= {
            f"{name}wkv.weight": ("F32", [2 * plain.hidden_size, config.engram.row_dim]),
            f"{name}q_weight": ("F32", [1, plain.hidden_size]),
            f"{name}k_weight": ("F32", [1, plain.hidden_size]),
            f"{name}embed.weight": ("F8_E4M3", [hashes.rows, WIDTH]),
            f"{name}embed.weight_scale_inv": ("F8_E8M0", [hashes.rows, WIDTH // BLOCK]),
        }
    _write_shard(path / "engram.safetensors", tensors, rng)
    old = "model.safetensors"
    index = json.loads((path / INDEX).read_text()) if (path / INDEX).exists() else None
    from safetensors import safe_open

    with safe_open(path / old, "np") as shard:
        mapped = index["weight_map"] if index else dict.fromkeys(shard.keys(), old)
    mapped |= dict.fromkeys(tensors, "engram.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    (path / "config.json").write_text(json.dumps(to_hub_config(config)))
    return path


def _write_shard(file: Path, tensors: dict[str, tuple[str, list[int]]], rng: np.random.Generator) -> None:
    header, at = {}, 0
    sizes = {name: int(np.prod(shape)) * (4 if dtype == "F32" else 1) for name, (dtype, shape) in tensors.items()}
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + sizes[name]]}
        at += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            if dtype == "F32":
                stream.write((rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5).tobytes())
                continue
            # E4M3 below 2 either sign; multipliers from a quarter to four.
            low, high = (0, 64) if dtype == "F8_E4M3" else (125, 130)
            some = rng.integers(low, high, 1 << 24, np.uint8)
            if dtype == "F8_E4M3":
                some |= rng.integers(0, 2, 1 << 24, np.uint8) << 7
            for start in range(0, sizes[name], len(some)):
                stream.write(some[: min(len(some), sizes[name] - start)].data)
        stream.flush()
        os.fsync(stream.fileno())


class Watched:
    """A look-up whose time is counted: what a step waits for it."""

    def __init__(self, feed: Any, forget: Path | None) -> None:
        self.feed, self.forget, self.seconds = feed, forget, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.feed, name)

    def rows(self, *arguments: Any) -> Any:
        if self.forget:
            drop(self.forget)
        start = time.perf_counter()
        try:
            return self.feed.rows(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


def drop(file: Path) -> None:
    """Let the page cache forget a file."""
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(file: Path) -> None:
    """Bring all of a file into the page cache."""
    with open(file, "rb", buffering=0) as stream:
        while stream.read(1 << 26):
            pass


@contextmanager
def looked_up(executor: OnnxExecutor, folder: Path, prefetch: bool, forget: Path | None) -> Iterator[Watched]:
    """The executor with a look-up that reads ahead within a step, or does not."""
    watched = Watched(load_feed(folder, np.float32, prefetch), forget)
    own, executor._lookup = executor._lookup, watched  # type: ignore[assignment]
    try:
        yield watched
    finally:
        executor._lookup = own


def decode(executor: OnnxExecutor, watched: Watched, rng: np.random.Generator) -> tuple[float, float]:
    """Milliseconds a token, and of it waiting for the look-up; medians."""
    state = executor.new_state()
    none = np.zeros((1, 0), np.int64)
    executor.step(rng.integers(3, 32000, (1, HELD)), state, logits_at_BQ=none)
    took, waited = [], []
    for token in rng.integers(3, 32000, TOKENS):
        watched.seconds, start = 0.0, time.perf_counter()
        executor.step(np.array([[token]]), state, logits_at_BQ=np.zeros((1, 1), np.int64))
        took.append(time.perf_counter() - start)
        waited.append(watched.seconds)
    # What dropping the file costs is not the model's.
    return float(np.median(took)) * 1e3, float(np.median(waited)) * 1e3


def prefill(executor: OnnxExecutor, watched: Watched, ahead: bool, rng: np.random.Generator) -> tuple[float, float]:
    """Seconds of a prompt, and of it waiting for the look-up, the next chunk's begun while one runs or not."""
    ids, state = rng.integers(3, 32000, (1, PROMPT)), executor.new_state()
    chunks = [ids[:, start : start + CHUNK] for start in range(0, PROMPT, CHUNK)]
    watched.seconds, start = 0.0, time.perf_counter()
    for i, chunk in enumerate(chunks):
        coming = (chunks[i + 1], None) if ahead and i + 1 < len(chunks) else None
        executor.step(chunk, state, logits_at_BQ=np.zeros((1, 0), np.int64), coming=coming)
    return time.perf_counter() - start, watched.seconds


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Where 13 GB are free.  [default: a temporary one]")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(folder: Path | None, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        hub = checkpoint(Path(scratch))
        out = Path(scratch) / "out"
        bundle = api.export(hub, out, precision="fp32", max_seq_len=MAX_SEQ_LEN, scan_values=False).bundle
        executor = OnnxExecutor(out, bundle.config, bundle.precision, max_seq_len=MAX_SEQ_LEN, threads=THREADS)
        table, rng = out / "weights" / "engram.safetensors", np.random.default_rng(1)
        lines = [row("decode, 512 cached", "read ahead", "ms a token", "look-up, ms", "share"), row(*["---"] * 5)]
        for where, forget in (("in memory", None), ("on disk", table)):
            touch(table)
            for ahead in (False, True):
                with looked_up(executor, out, ahead, forget) as watched:
                    took, waited = decode(executor, watched, rng)
                lines.append(
                    row(f"tables {where}", "pages of a step" if ahead else "no", f"{took:.1f}", f"{waited:.2f}",
                        f"{waited / took:.1%}")
                )  # fmt: skip
        lines += ["", row(f"prompt of {PROMPT}, chunks of {CHUNK}", "next chunk ahead", "s", "waiting, s", "share")]
        lines.append(row(*["---"] * 5))
        for where, cold in (("in memory", False), ("on disk", True)):
            for ahead in (False, True):
                drop(table) if cold else touch(table)
                with looked_up(executor, out, True, None) as watched:
                    took, waited = prefill(executor, watched, ahead, rng)
                lines.append(
                    row(f"tables {where}", "yes" if ahead else "no", f"{took:.2f}", f"{waited:.3f}",
                        f"{waited / took:.1%}")
                )  # fmt: skip
    note = f"{THREADS} threads, float32, 1.05e9 parameters beside 4 GB of tables; `python benchmarks/engram_decode.py`."
    replace_between(into, BEGIN, END, ["\n".join(lines), note])
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
