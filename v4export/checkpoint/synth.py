"""Writes a Hub-format checkpoint of any configuration, with random weights or with none.

DeepSeek-V4 is written in DeepSeek's own names, as the Hub has it. Values are drawn so that activations stay near 1.
Each weight's come from its own generator, seeded by its name, so they do not depend on the order of writing, on
sharding, or on whether experts are fused. Tensors are written a few rows at a time; a sparse checkpoint has the real
sizes and holes in place of bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from v4export.checkpoint import names
from v4export.checkpoint.aliases import native
from v4export.checkpoint.byte_tokenizer import write_tokenizer
from v4export.checkpoint.formats import FP4_BLOCK, FP8_ROW, grid, quantize_blocks, quantize_fp4
from v4export.checkpoint.index import INDEX
from v4export.checkpoint.names import SCALE, Expected
from v4export.checkpoint.tensor import DTYPES
from v4export.config import ModelConfig
from v4export.config.readers import to_hub_config
from v4export.engram.vocabulary import compress
from v4export.errors import BadInput, NotEnough, NotSupported
from v4export.precision import FLOAT32_ROLES, MATRIX_ROLES

SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 22  # elements drawn at a time
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FIXED = dict.fromkeys(FLOAT32_ROLES, "F32") | {"hash_table": "I64"}

# role -> (mean, standard deviation given the fan-in)
DRAWN: dict[str, tuple[float, Callable[[int], float]]] = {
    "linear": (0.0, lambda fan_in: fan_in**-0.5),
    "expert": (0.0, lambda fan_in: fan_in**-0.5),
    "router": (0.0, lambda fan_in: fan_in**-0.5),
    "head": (0.0, lambda fan_in: fan_in**-0.5),
    "embedding": (0.0, lambda fan_in: 1.0),
    "norm": (1.0, lambda fan_in: 0.1),
    "bias": (0.0, lambda fan_in: 0.1),
    "router_bias": (0.0, lambda fan_in: 0.05),
    "projection": (0.0, lambda fan_in: fan_in**-0.5),
    "hyper": (0.0, lambda fan_in: fan_in**-0.5),
    "sink": (0.0, lambda fan_in: 1.0),
    "position_bias": (0.0, lambda fan_in: 1.0),
    "engram_table": (0.0, lambda fan_in: 1.0),
    "convolution": (0.0, lambda fan_in: fan_in**-0.5),
}
# Last part of a name -> the same, where a role has several sorts of tensor.
_DRAWN_BY_NAME: dict[str, tuple[float, Callable[[int], float]]] = {
    "bias": (0.0, lambda fan_in: 0.1),
    "base": (0.0, lambda fan_in: 0.5),
    "hc_base": (0.0, lambda fan_in: 0.5),
    "scale": (1.0, lambda fan_in: 0.1),
    "hc_scale": (1.0, lambda fan_in: 0.1),
}

Quantize = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Format:
    """How a weight is quantised: stored dtypes, numbers in an item, rows and columns that share a multiplier."""

    dtype: str
    scale_dtype: str
    per_item: int
    block: tuple[int, int]
    quantize: Quantize


def _format(config: ModelConfig, role: str) -> _Format | None:
    """The format of a role's weights, or None where they are not quantised."""
    if role == "expert" and config.fp4_experts:
        return _Format("I8", "F8_E8M0", 2, FP4_BLOCK, quantize_fp4)
    fp8 = config.fp8
    if fp8 and role == "engram_table" and config.engram and config.engram.width % FP8_ROW[1] == 0:
        return _Format(
            "F8_E4M3", "F8_E8M0", 1, FP8_ROW, lambda rows: quantize_blocks(rows, *FP8_ROW, power_of_two=True)
        )
    if fp8 is None or role not in MATRIX_ROLES:
        return None
    # DeepSeek-V4 stores a power of two as its exponent, the releases before it as float32.
    scale_dtype = "F8_E8M0" if fp8.power_of_two and config.compressed else "F32"

    def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return quantize_blocks(rows, fp8.rows, fp8.columns, fp8.power_of_two)

    return _Format("F8_E4M3", scale_dtype, 1, (fp8.rows, fp8.columns), quantize)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: the canonical weights it holds one after another, or, for a scale, theirs."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Expected, ...]
    quantized: _Format | None = None
    is_scale: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes once written."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def planned_tensors(config: ModelConfig, fused: bool = False) -> Iterator[Planned]:
    """Every tensor that a checkpoint of a configuration has, in reading order."""
    fusing = names.fused(config) if fused else {}
    inside = {one.name: name for name, experts in fusing.items() for pieces in experts for one in pieces}
    written = set()
    for one in names.expected(config).values():
        name = inside.get(one.name, one.name)
        if name in written:
            continue
        written.add(name)
        pieces: tuple[Expected, ...] = (one,)
        shape = one.shape
        if name in fusing:
            experts = fusing[name]
            pieces = tuple(piece for expert in experts for piece in expert)
            shape = (len(experts), sum(piece.shape[0] for piece in experts[0]), one.shape[1])
        drafter = config.num_layers if config.drafts else None
        stored = native(name, drafter) if config.compressed else name
        quantized = _format(config, one.role)
        if quantized is None:
            yield Planned(stored, _FIXED.get(one.role, _STORED[config.dtype]), shape, pieces)
            continue
        block = quantized.block
        if len(shape) == 3 and any(piece.shape[0] % block[0] for piece in experts[0][:-1]):
            raise NotSupported(
                "fused FP8 experts need projections of whole blocks",
                f"{one.shape[0]} rows each, blocks of {block[0]}",
                "Write the experts one by one.",
            )
        items = (*shape[:-1], shape[-1] // quantized.per_item)
        scale = native(name + SCALE, drafter) if config.compressed else name + SCALE
        yield Planned(stored, quantized.dtype, items, pieces, quantized)
        yield Planned(scale, quantized.scale_dtype, grid(shape, block), pieces, quantized, is_scale=True)


def _shards(plan: Iterator[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        if shards[-1] and size + planned.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.nbytes
    # Wide items first, as the format's own library does, so that each lies at a multiple of its size.
    return [sorted(shard, key=lambda p: 0 if p.quantized else -DTYPES[p.dtype].itemsize) for shard in shards]


def _rows(one: Expected, seed: int, multiple: int) -> Iterator[np.ndarray]:
    """The weight as float32, a few rows at a time, a multiple of ``multiple`` but for the last."""
    mean, deviation = _DRAWN_BY_NAME.get(one.name.rsplit(".", 1)[-1], DRAWN[one.role])
    rng = _generator(one, seed)
    columns = math.prod(one.shape[1:])
    step = max(1, _CHUNK // (columns * multiple)) * multiple
    for start in range(0, one.shape[0], step):
        values = rng.standard_normal((min(step, one.shape[0] - start), *one.shape[1:]), np.float32)
        values *= deviation(one.shape[-1])
        values += mean
        yield values


def _hash_rows(one: Expected, experts: int, seed: int) -> Iterator[np.ndarray]:
    """For each token id, distinct experts: the places of the least of random numbers."""
    rng = _generator(one, seed)
    step = max(1, _CHUNK // experts)
    for start in range(0, one.shape[0], step):
        values = rng.random((min(step, one.shape[0] - start), experts))
        yield values.argpartition(one.shape[1] - 1, axis=1)[:, : one.shape[1]].astype(np.int64)


def _generator(one: Expected, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *hashlib.sha256(one.name.encode()).digest()])


def _chunks(shard: list[Planned], experts: int, seed: int) -> Iterator[np.ndarray]:
    scales: list[np.ndarray] = []
    for planned in shard:
        dtype = DTYPES[planned.dtype]
        if planned.is_scale:
            # A scale may open a shard, its weight having closed the one before.
            yield from (s.astype(dtype) for s in scales or (s for _, s in _quantized(planned, seed)))
            scales = []
        elif planned.quantized:
            for data, scale in _quantized(planned, seed):
                scales.append(scale)
                yield data
        else:
            for one in planned.pieces:
                rows = _hash_rows(one, experts, seed) if one.role == "hash_table" else _rows(one, seed, 1)
                yield from (some.astype(dtype) for some in rows)


def _quantized(planned: Planned, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    assert planned.quantized is not None
    for one in planned.pieces:
        for rows in _rows(one, seed, planned.quantized.block[0]):
            yield planned.quantized.quantize(rows)


def _write_shard(
    file: Path,
    shard: list[Planned],
    chunks: Iterator[np.ndarray] | None,
    advance: Callable[[float], None] | None,
) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for planned in shard:
        offsets = [at, at + planned.nbytes]
        entries[planned.name] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": offsets}
        at += planned.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8, as the format's own library writes it
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        if chunks is None:
            stream.truncate(8 + len(header) + at)
            if advance:
                advance(at)
            return
        for chunk in chunks:
            stream.write(np.ascontiguousarray(chunk).view(np.uint8).data)
            if advance:
                advance(chunk.nbytes)


def _generation_config(config: ModelConfig) -> dict[str, object]:
    eos = list(config.eos_token_ids)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True} | {key: value for key, value in ids.items() if value is not None}


def synth(
    config: ModelConfig,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    sparse: bool = False,
    shard_bytes: int = SHARD_BYTES,
    fused: bool = False,
    advance: Callable[[float], None] | None = None,
) -> Path:
    """Writes a checkpoint; the directory appears whole or not at all.

    Args:
        config: what to write; its linear layers are FP8 where it has ``fp8``, its experts FP4 where it says so.
        directory: must not exist.
        seed: same seed, same values.
        dtype: of the tensors that are not quantised: bfloat16, float16 or float32; the configuration's own by default.
        sparse: write holes in place of values: real sizes, no disk.
        shard_bytes: files are kept below this where a single tensor is not larger.
        fused: store a layer's experts as two tensors in place of three an expert.
        advance: called with the bytes just written.

    Raises:
        BadInput: the directory exists, or the dtype is not one of the three.
        NotEnough: the disk is too small.
        NotSupported: fused FP8 experts whose width is not a multiple of the block.
    """
    directory = Path(directory)
    config = replace(config, dtype=dtype or config.dtype)
    if config.dtype not in _STORED:
        raise BadInput(
            "weights cannot be written in this dtype", f"dtype = {dtype!r}", f"Use one of {', '.join(_STORED)}."
        )
    if directory.exists() or directory.is_symlink():
        raise BadInput(f"{directory} exists already", fix="Give a directory that does not, or remove it.")
    if shard_bytes < 1:
        raise BadInput("shards need a size", f"shard_bytes = {shard_bytes}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    shards = _shards(planned_tensors(config, fused), shard_bytes)
    needed, free = sum(p.nbytes for shard in shards for p in shard), shutil.disk_usage(directory.parent).free
    if needed > free and not sparse:
        raise NotEnough(
            f"{directory.parent} has too little space", f"needed {needed:,} bytes, free {free:,}", "Use sparse."
        )
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(partial, config, shards, None if sparse else seed, advance)
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _fill(
    folder: Path,
    config: ModelConfig,
    shards: list[list[Planned]],
    seed: int | None,
    advance: Callable[[float], None] | None,
) -> None:
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        numbered = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        name = numbered if len(shards) > 1 else "model.safetensors"
        weight_map |= {planned.name: name for planned in shard}
        chunks = None if seed is None else _chunks(shard, config.num_experts, seed)
        _write_shard(folder / name, shard, chunks, advance)
    if len(shards) > 1:
        total = sum(planned.nbytes for shard in shards for planned in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_tokenizer(config, folder)
    _write_json(folder / "config.json", to_hub_config(_with_its_words(config, folder)))
    _write_json(folder / "generation_config.json", _generation_config(config))


def _with_its_words(config: ModelConfig, folder: Path) -> ModelConfig:
    """The model with as many different tokens as the tokenizer in the folder has, which Engram's hashes depend on."""
    engram = config.engram
    if engram is None:
        return config
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(
            "a model with Engram needs a tokenizer, and the vocabulary is too small for one of bytes",
            f"vocab_size = {config.vocab_size}",
            "Give 256 and more, besides special tokens.",
        )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = compress(tokenizer, config.vocab_size, engram.pad_token_id)[1]
    return replace(config, engram=replace(engram, compressed_vocab=words))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
