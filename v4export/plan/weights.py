"""Bytes of a graph's weights, to the byte: what is pointed at, what is written, what is written once more for a CPU.

They follow from how weights are stored and from the recipe, by the rules that an export itself goes by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from v4export.checkpoint.activation_scales import wanted_shapes
from v4export.checkpoint.audit import Weight, in_graph
from v4export.config import ModelConfig
from v4export.graphs.repacked import wanted
from v4export.graphs.shards import EXPONENTS, SAFETENSORS_NAMES
from v4export.graphs.weights import decide
from v4export.precision import Precision

_FLOAT32, _BFLOAT16 = 4, 2


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a graph in a recipe.

    Attributes:
        pointed: by name, bytes used where they lie.
        written: by name, bytes converted and written; scales of inputs among them.
        cpu: bytes written once more, as onnxruntime's kernels for integer matrices read them.
        beside: bytes of tables that are read beside the graph.
        tensors: how many initialisers hold them.
        shard_bytes: bytes of the files that are pointed at, or lie beside the graph.
        converted: numbers that are converted, by the name of the format that they become.
        multipliers: bytes of multipliers that are written anew, beside numbers that are pointed at.
        for_engines: bytes of multipliers that are written once more, as TensorRT reads them.
    """

    pointed: Mapping[str, int]
    written: Mapping[str, int]
    cpu: int
    beside: int
    tensors: int
    shard_bytes: int
    converted: Mapping[str, int]
    multipliers: int
    for_engines: int

    @property
    def pointed_bytes(self) -> int:
        """Bytes used where they lie."""
        return sum(self.pointed.values())

    @property
    def written_bytes(self) -> int:
        """Bytes converted and written."""
        return sum(self.written.values())

    @property
    def each(self) -> dict[str, int]:
        """Bytes by name."""
        names = {**self.pointed, **self.written}
        return {name: self.pointed.get(name, 0) + self.written.get(name, 0) for name in names}

    @property
    def total(self) -> int:
        """Bytes that a graph reads."""
        return self.pointed_bytes + self.written_bytes


def weight_bytes(
    weights: Mapping[str, Weight], config: ModelConfig, precision: Precision, cpu_weights: bool = True
) -> WeightBytes:
    """What an export of these weights points at and writes.

    Raises:
        NotSupported: rows are not a whole number of a format's blocks.
    """
    inside = in_graph(weights, config)
    pointed: dict[str, int] = {}
    written: dict[str, int] = {}
    tensors, files = 0, set()
    numbers: Counter[str] = Counter()
    multipliers = exponents = 0
    for name, weight in inside.items():
        kept, converted = decide(weight, precision)
        tensors += len(kept) + len(converted)
        if kept:
            pointed[name] = sum(t.nbytes for _, t in kept)
            files |= {t.file for _, t in kept}
            exponents += sum(t.nbytes for _, t in kept if t.dtype == SAFETENSORS_NAMES[EXPONENTS])
        if converted:
            written[name] = sum(c.nbytes for c in converted)
            multipliers += written[name] if kept else 0
            numbers[precision.format_of(name, weight.role).name] += 0 if kept else math.prod(weight.shape)
    written |= {name: _FLOAT32 * math.prod(shape) for name, shape in wanted_shapes(config, precision).items()}
    cpu = sum(one.nbytes for one in wanted(inside, precision).values()) if cpu_weights else 0
    outside = [t for n in weights.keys() - inside.keys() for t in (weights[n].data, weights[n].scale) if t]
    beside = sum(t.nbytes for t in outside)
    files |= {t.file for t in outside}
    # A checkpoint that is only imagined has no files.
    shards = sum(f.stat().st_size for f in files) if all(f.is_file() for f in files) else None
    found = WeightBytes(pointed, written, cpu, beside, tensors, 0, numbers, multipliers, _BFLOAT16 * exponents)
    return replace(found, shard_bytes=found.pointed_bytes + beside if shards is None else shards)
