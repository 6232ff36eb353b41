"""Accounts for every stored tensor: used, merged into another, or skipped for a stated reason.

Anything left over, missing, of a wrong shape or dtype, or not finite is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from v4export.checkpoint import names, names_draft
from v4export.checkpoint.formats import FP4_BLOCK, FP8_ROW, decode, dequantize_blocks, dequantize_fp4, grid
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.names import SCALE, Expected
from v4export.checkpoint.scan import not_finite
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import Fp8Blocks, ModelConfig
from v4export.config.chosen import DSPARK
from v4export.errors import BadInput, NotSupported

_PLAIN = ("BF16", "F16", "F32")
_QUANTIZED = "F8_E4M3"
_PACKED = ("I8", "U8")  # two E2M1 numbers in a byte
# role -> stored dtypes that are right for it
DTYPES: dict[str, tuple[str, ...]] = {
    "linear": (*_PLAIN, _QUANTIZED),
    "expert": (*_PLAIN, _QUANTIZED, *_PACKED),
    "engram_table": (*_PLAIN, _QUANTIZED),
    "hash_table": ("I64", "I32"),
} | dict.fromkeys(
    ("router", "router_bias", "norm", "embedding", "head", "bias", "projection", "hyper", "sink", "position_bias",
     "convolution"),
    _PLAIN,
)  # fmt: skip
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class _Format:
    """How a quantised weight is stored."""

    dtypes: tuple[str, ...]
    name: str
    key: str  # of config.json that says so
    block: tuple[int, int]  # rows and columns that share a multiplier
    scale_dtypes: tuple[str, ...]
    per_item: int = 1  # numbers in a stored item

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of a weight."""
        return (*shape[:-1], shape[-1] // self.per_item)


def _formats(config: ModelConfig) -> tuple[_Format, ...]:
    fp8 = config.fp8 or Fp8Blocks()
    return (
        _Format((_QUANTIZED,), "FP8", "quantization_config", (fp8.rows, fp8.columns), SCALE_DTYPES),
        _Format(_PACKED, "FP4", "expert_dtype fp4", FP4_BLOCK, ("F8_E8M0",), 2),
    )


#: Rows of an Engram table: any of a table's, whatever config.json says of other weights.
_ROWS = _Format((_QUANTIZED,), "FP8", "", FP8_ROW, ("F8_E8M0",))

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor the model needs, or a piece of one, and where its bytes are.

    ``scale`` is there exactly where ``data`` is FP8 or FP4. ``columns`` are those of ``data`` that a piece has, in
    numbers; ``shape`` is the piece's.
    """

    name: str  # canonical
    shape: tuple[int, ...]  # in numbers, of which FP4 data have two a byte
    role: str
    data: StoredTensor
    scale: StoredTensor | None = None
    block: tuple[int, int] = (128, 128)  # rows and columns that share a multiplier
    piece: str = ""  # which one, behind the names of its tensors
    columns: tuple[int, int] | None = None

    @property
    def packed(self) -> bool:
        """Whether the data are FP4, two numbers in a byte."""
        return self.scale is not None and self.data.dtype in _PACKED

    def decode(self) -> np.ndarray:
        """The values as float32, dequantised, in memory of their own; integers as int64."""
        values = self._decode()
        return values if self.columns is None else values[:, slice(*self.columns)]

    def _decode(self) -> np.ndarray:
        if self.role == "hash_table":
            return self.data.read().astype(np.int64)
        if self.scale is None:
            return decode(self.data.read())
        if self.packed:
            return dequantize_fp4(self.data.read(), self.scale.read())
        return dequantize_blocks(self.data.read(), self.scale.read(), self.block)


@dataclass(frozen=True)
class Audit:
    """The account of a checkpoint. Each stored tensor is in exactly one of ``used``, ``merged`` and ``skipped``."""

    weights: dict[str, Weight]  # canonical name -> weight, in reading order
    used: tuple[str, ...]  # a weight by itself
    merged: tuple[str, ...]  # a scale, or a fused tensor cut into experts
    skipped: dict[str, str]  # name -> reason

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors are used, merged and skipped."""
        return {"used": len(self.used), "merged": len(self.merged), "skipped": len(self.skipped)}

    def summary(self) -> str:
        """One line: how many tensors went where, and why some were not needed."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.skipped.values()).items())
        skipped = f"{len(self.skipped)} skipped" + (f" ({reasons})" if reasons else "")
        return f"{len(self.used)} tensors used, {len(self.merged)} merged, {skipped}"


@dataclass
class _Sorting:
    """The checkpoint's tensors while they are being given to weights."""

    checkpoint: Checkpoint
    expected: dict[str, Expected]
    formats: tuple[_Format, ...]
    said: tuple[_Format, ...]  # those that the configuration says there are
    weights: dict[str, Weight] = field(default_factory=dict)
    found: set[str] = field(default_factory=set)  # canonical names that something is stored for, right or wrong
    used: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    faults: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, kind: str, text: str) -> None:
        self.faults.setdefault(kind, []).append(text)

    def add(self, one: Expected, data: StoredTensor, scale: StoredTensor | None) -> None:
        """Gives a weight its bytes, or notes what is wrong with them."""
        formats, allowed = ((_ROWS,),) * 2 if one.role == "engram_table" else (self.formats, self.said)
        found = next((f for f in formats if data.dtype in f.dtypes), None)
        said = found is None or found in allowed
        shape = found.stored(one.shape) if found else one.shape
        name = _shown(one.name, data)
        if data.dtype not in DTYPES[one.role] or not said:
            others = {dtype for f in formats if f not in allowed for dtype in f.dtypes}
            wanted = " or ".join(dtype for dtype in DTYPES[one.role] if dtype not in others)
            note = f" (config.json has no {found.key})" if found and data.dtype in DTYPES[one.role] else ""
            self.fault("of the wrong dtype", f"{name}: expected {wanted}, found {data.dtype}{note}")
        elif data.shape != shape:
            self.fault("of the wrong shape", f"{name}: expected {list(shape)}, found {list(data.shape)}")
        elif found and scale is None:
            self.fault(f"{found.name} without their scale", f"{name} has no {one.name}{SCALE}")
        elif scale is not None and not found:
            self.fault("not quantised and have a scale", f"{name} is {data.dtype}")
        elif found and scale is not None:
            self.check_scale(one, found, scale)
        block = found.block if found else formats[0].block
        self.weights[one.name] = Weight(one.name, one.shape, one.role, data, scale, block)

    def check_scale(self, one: Expected, found: _Format, scale: StoredTensor) -> None:
        """Notes what is wrong with multipliers."""
        name, shape = _shown(one.name + SCALE, scale), grid(one.shape, found.block)
        if scale.dtype not in found.scale_dtypes:
            wanted = " or ".join(found.scale_dtypes)
            self.fault("of the wrong dtype", f"{name}: expected {wanted}, found {scale.dtype}")
        elif scale.shape != shape:
            self.fault("of the wrong shape", f"{name}: expected {list(shape)}, found {list(scale.shape)}")

    def single(self) -> None:
        """Takes weights that are stored by themselves."""
        tensors = self.checkpoint.tensors
        for name, one in self.expected.items():
            if name in tensors:
                scale = tensors.get(name + SCALE)
                self.add(one, tensors[name], scale)
                self.found.add(name)
                self.used.append(name)
                self.merged += [name + SCALE] if scale else []

    def fused(self) -> None:
        """Cuts fused experts into the canonical ones."""
        tensors = self.checkpoint.tensors
        for name, experts in names.fused(self.checkpoint.config).items():
            if name not in tensors:
                continue
            self.found |= {one.name for pieces in experts for one in pieces}
            data, scale = tensors[name], tensors.get(name + SCALE)
            found = next((f for f in self.formats if data.dtype in f.dtypes), None)
            shape = (len(experts), sum(one.shape[0] for one in experts[0]), experts[0][0].shape[1])
            stored = found.stored(shape) if found else shape
            scale_shape = grid(shape, found.block) if found else None
            if data.shape != stored:
                self.fault("of the wrong shape", f"{name}: expected {list(stored)}, found {list(data.shape)}")
            elif scale and scale_shape and scale.shape != scale_shape:
                wanted, there = list(scale_shape), list(scale.shape)
                self.fault("of the wrong shape", f"{name}{SCALE}: expected {wanted}, found {there}")
            elif scale and found and any(one.shape[0] % found.block[0] for one in experts[0][:-1]):
                raise NotSupported(
                    "a fused tensor has FP8 blocks that belong to two projections",
                    f"{name}: {experts[0][0].shape[0]} rows each, blocks of {found.block[0]}",
                    "Store the experts one by one.",
                )
            else:
                for e, pieces in enumerate(experts):
                    block = found.block[0] if found else 1
                    self.cut(pieces, data.slice0(e), scale.slice0(e) if scale else None, block)
            self.merged += [name, name + SCALE] if scale else [name]

    def cut(self, pieces: list[Expected], data: StoredTensor, scale: StoredTensor | None, block: int) -> None:
        """Cuts one expert's rows into its projections; ``block`` rows share a multiplier."""
        at = 0
        for one in pieces:
            stop = at + one.shape[0]
            part = scale.part0(at // block, -(-stop // block)) if scale else None
            if one.name in self.weights:
                self.fault("stored twice", f"{one.name}, by itself and in {data.name}")
            else:
                self.add(one, data.part0(at, stop), part)
            at = stop

    def rest(self) -> dict[str, str]:
        """Accounts for what no weight took, and for weights that nothing was found for."""
        taken = {*self.used, *self.merged}
        skipped = {}
        for name, tensor in self.checkpoint.tensors.items():
            if name in taken:
                continue
            reason = names.skip_reason(name, self.checkpoint.config)
            if reason is None:
                self.fault("not part of the model", _shown(name, tensor))
            else:
                skipped[name] = reason
        for name in self.expected:
            if name not in self.found:
                self.fault("missing", name)
        return skipped


def audit(checkpoint: Checkpoint, *, scan_values: bool = True, advance: Callable[[float], None] | None = None) -> Audit:
    """Checks a checkpoint against its configuration, and says where each weight's bytes are.

    Args:
        checkpoint: an opened checkpoint.
        scan_values: read every needed tensor once, in windows, and look for NaN and infinity. Engram tables, of which
            few rows are ever read, are left out: rows are checked as they are looked up.
        advance: called with the bytes just scanned; they sum to at most ``checkpoint.nbytes``.

    Raises:
        BadInput: a tensor is missing, left over, of the wrong shape or dtype, without its scale, or not finite.
        NotSupported: fused FP8 experts whose blocks straddle two projections.
    """
    config = checkpoint.config
    formats = _formats(config)
    said = tuple(f for f, there in zip(formats, (config.fp8, config.fp4_experts), strict=True) if there)
    sorting = _Sorting(checkpoint, names.expected(config), formats, said)
    sorting.single()
    sorting.fused()
    _check_drafter(checkpoint)
    skipped = sorting.rest()
    if sorting.faults:
        raise _error(checkpoint, sorting.faults)
    if scan_values:
        looked_up = {name for one in sorting.expected.values() if one.role == "engram_table" for name in _both(one)}
        bad = not_finite(_in_file_order(checkpoint, {*sorting.used, *sorting.merged} - looked_up), advance)
        if bad:
            called = {tensor.name: _shown(name, tensor) for name, tensor in checkpoint.tensors.items()}
            raise BadInput(
                f"{len(bad)} tensors hold NaN or infinity",
                ", ".join(called[name] for name in bad[:_SHOWN]) + (", ..." if len(bad) > _SHOWN else ""),
                f"{checkpoint.directory} is damaged or was trained to divergence; download it again.",
            )
        _check_tables(sorting.weights, config.num_experts)
    weights = {name: sorting.weights[name] for name in sorting.expected}
    return Audit(weights, tuple(sorting.used), tuple(sorting.merged), skipped)


def in_graph(weights: Mapping[str, Weight], config: ModelConfig) -> dict[str, Weight]:
    """Those that are part of a graph: rows of Engram tables are found outside, unless tables are inside."""
    inside = bool(config.engram and config.engram.inside)
    return {name: w for name, w in weights.items() if inside or w.role != "engram_table"}


def _both(one: Expected) -> tuple[str, str]:
    return one.name, one.name + SCALE


def _check_drafter(checkpoint: Checkpoint) -> None:
    """Raises where there is nothing to draft with, or what there is is of a kind that is not exported."""
    if not checkpoint.config.drafts:
        return
    found = [t.name for t in checkpoint.tensors.values() if re.fullmatch(names_draft.DSPARK, t.name)]
    if found:
        raise NotSupported(DSPARK, f"{found[0]} and {len(found) - 1} more are its own", "leave --draft out")
    prefix = names.drafter_prefix(checkpoint.config)
    if not any(name.startswith(prefix) for name in checkpoint.tensors):
        raise BadInput(
            "this checkpoint has no multi-token prediction layer, though config.json speaks of one",
            f"nothing is stored below {prefix} in {checkpoint.directory}",
            "leave --draft out",
        )


def _check_tables(weights: dict[str, Weight], experts: int) -> None:
    for weight in weights.values():
        if weight.role == "hash_table":
            table = weight.decode()
            if table.min() < 0 or table.max() >= experts:
                raise BadInput(
                    "a table routes tokens to experts that do not exist",
                    f"{weight.name} has {table.min()} to {table.max()}, experts are 0 to {experts - 1}",
                )


def _shown(name: str, tensor: StoredTensor) -> str:
    """A name, and the stored one where that is another."""
    return name if tensor.name == name else f"{name} (stored as {tensor.name})"


def _in_file_order(checkpoint: Checkpoint, wanted: set[str]) -> Iterator[StoredTensor]:
    return (tensor for name, tensor in checkpoint.tensors.items() if name in wanted)


def _error(checkpoint: Checkpoint, faults: dict[str, list[str]]) -> BadInput:
    lines = []
    for kind, texts in faults.items():
        more = ", ..." if len(texts) > _SHOWN else ""
        lines.append(f"{len(texts)} {kind}: {', '.join(texts[:_SHOWN])}{more}")
    fix = "Check that config.json belongs to these weights, and that the download is complete."
    return BadInput(
        f"the tensors of {checkpoint.directory} are not those of its configuration", "\n  ".join(lines), fix
    )
