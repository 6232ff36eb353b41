"""What a finished engine is made of, read back without a GPU, and whether that is the precision asked for.

Nothing can deserialise an engine where there is no GPU, so three other things are read:

* the parsed network, which says in which type each layer computes, and what each dequantising layer reads;
* the plan's header: its length, TensorRT's version, and the mask of compute capabilities it was built for;
* the listing that the compiler leaves in the plan: every constant with its size and type, as they lie in GPU memory.

None is documented, so a plan in which the listing is not found is judged by the weights' own bytes: a run of them, as
they are in the checkpoint or transposed, occurs in the plan only if they were not converted. What holds only where a
GPU is comes from TensorRT's own inspector.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

MAGIC, HEADER_BYTES = b"vtrt", 36
MASK_BITS = {"sm75": 1, "sm80": 2, "sm86": 4, "sm89": 8, "sm120": 16, "sm121": 32}
PLUGIN_LAYER = "PLUGIN_V3"
MATRIX_LAYERS = ("MATRIX_MULTIPLY", "EINSUM", "CONVOLUTION", "ATTENTION_INPUT", "MOE")


@dataclass(frozen=True)
class Format:
    """A format of stored weights: its types in ONNX, the parsed network and the plan, and bits of a number."""

    onnx: int
    network: str
    plan: str
    bits: int

    def size(self, dims: Sequence[int]) -> int:
        """Bytes of a tensor."""
        return math.prod(dims) * self.bits // 8


#: The format of matrices that plugins read.
WORDS = "words"
FORMATS = {
    "fp32": Format(onnx.TensorProto.FLOAT, "FLOAT", "float", 32),
    "fp16": Format(onnx.TensorProto.FLOAT16, "HALF", "half", 16),
    "bf16": Format(onnx.TensorProto.BFLOAT16, "BF16", "bf16", 16),
    "fp8": Format(onnx.TensorProto.FLOAT8E4M3FN, "FP8", "fp8_e4m3", 8),
    "fp4": Format(onnx.TensorProto.FLOAT4E2M1, "FP4", "fp4_e2m1", 4),
    "int8": Format(onnx.TensorProto.INT8, "INT8", "int8", 8),
    "int4": Format(onnx.TensorProto.INT4, "INT4", "int4", 4),
    # What is packed for plugins, which widen it themselves.
    WORDS: Format(onnx.TensorProto.INT32, "INT32", "int32", 32),
}
#: Formats that a dequantising layer widens before anything else can take them.
QUANTIZED = ("fp8", "fp4", "int8", "int4")
# Tables that the compiler computes once, and constants of its own, are wider than the weights and need not be few.
_WIDER_ALLOWED = 1.1
_SMALL = 1 << 20
# Routers multiply in float32, to which the compiler widens their matrices: some thousandth of a model's.
_ROUTERS = 0.005
_RUN, _SAMPLES, _LEAST_VARIETY = 256, 8, 16
#: What a plugin of experts reads is part of its name.
_WIDENED = re.compile(r"Expert[A-Z][a-z]+(Fp[48])")
_CONSTANT = re.compile(rb"const_payload_size=(\d+)[^\n]*? type=(\w+)")


@dataclass(frozen=True)
class Proof:
    """One thing asked of the engine, what was found, and whether they agree."""

    claim: str
    evidence: str
    holds: bool


@dataclass
class NetworkFacts:
    """The parsed network: layers by type, output types, types of matrix layers, types that dequantising layers and
    plugins widen.
    """

    layers: Counter[str] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)
    dequantized: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PlanHeader:
    """A plan's header: its own length, the version that wrote it, and what it was built for."""

    size: int
    version: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class PlanFacts:
    """The plan: its header, and bytes of constants by type in the compiler's listing (empty when it has none).

    Bytes count once for each time the compiler listed them, which is once a profile; their ratios do not depend on it.
    """

    size: int
    header_size: int
    version: str
    targets: tuple[str, ...]
    constants: dict[str, int]


@dataclass(frozen=True)
class WeightFacts:
    """The ONNX file's initialisers: bytes by format, and runs of bytes of some of those in the formats asked for."""

    sizes: dict[str, int]
    samples: dict[str, dict[str, tuple[bytes, ...]]]


def read_network(network: Any) -> NetworkFacts:
    """Counts over a parsed INetworkDefinition."""
    facts = NetworkFacts()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = _last(layer.type)
        types = [_last(layer.get_output(i).dtype) for i in range(layer.num_outputs) if layer.get_output(i) is not None]
        facts.layers[kind] += 1
        facts.dtypes.update(types)
        if kind in MATRIX_LAYERS:
            facts.matrix.update(types[:1])
        if kind == "DEQUANTIZE":
            facts.dequantized[_last(layer.get_input(0).dtype)] += 1
        if kind == PLUGIN_LAYER and (found := _WIDENED.search(layer.name)):
            facts.dequantized[found[1].upper()] += 1
    return facts


def _last(enum: Any) -> str:
    return str(enum).rpartition(".")[2]


def plan_header(start: bytes) -> PlanHeader | None:
    """What the first ``HEADER_BYTES`` of a plan say; None where they are no header that is known.

    Offsets were found by building for known targets.
    """
    if start[:4] != MAGIC or len(start) < HEADER_BYTES:
        return None
    (size,) = struct.unpack_from("<Q", start, 16)
    version = ".".join(str(byte) for byte in start[24:28])
    (mask,) = struct.unpack_from("<I", start, 32)
    return PlanHeader(size, version, tuple(name for name, bit in MASK_BITS.items() if mask & bit))


def read_plan(path: Path) -> PlanFacts:
    """The header and the constants of a plan."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        header = plan_header(plan[:HEADER_BYTES]) or PlanHeader(0, "", ())
        return PlanFacts(len(plan), header.size, header.version, header.targets, _constants(plan))


def _constants(plan: mmap.mmap) -> dict[str, int]:
    found: Counter[str] = Counter()
    for match in _CONSTANT.finditer(plan):
        found[match[2].decode()] += int(match[1])
    return dict(found)


def read_weights(path: Path, stored: Sequence[str]) -> WeightFacts:
    """Sizes of an ONNX file's initialisers, and some bytes of those in the formats ``stored``."""
    proto = onnx.load(path, load_external_data=False)
    names = {one.onnx: name for name, one in FORMATS.items()}
    sizes: Counter[str] = Counter()
    matrices: dict[str, list[onnx.TensorProto]] = {name: [] for name in stored}
    for tensor in proto.graph.initializer:
        name = names.get(tensor.data_type)
        if name is None:
            continue
        sizes[name] += FORMATS[name].size(tensor.dims)
        if name in matrices and len(tensor.dims) >= 2 and FORMATS[name].size(tensor.dims) >= _RUN:
            matrices[name].append(tensor)
    samples = {name: _samples(FORMATS[name], found, path.parent) for name, found in matrices.items()}
    return WeightFacts(dict(sizes), samples)


def _samples(stored: Format, matrices: Sequence[onnx.TensorProto], folder: Path) -> dict[str, tuple[bytes, ...]]:
    few = matrices[:: max(1, len(matrices) // _SAMPLES)]
    return {tensor.name: runs for tensor in few if (runs := _runs(tensor, stored, folder))}


def _runs(tensor: onnx.TensorProto, stored: Format, folder: Path) -> tuple[bytes, ...]:
    """A run along a middle row and one along a middle column; none where too uniform to be recognised.

    Numbers of half a byte are run along rows alone: no byte of a transposed matrix is one of the matrix.
    """
    count = stored.size(tensor.dims)
    data: np.ndarray
    if tensor.HasField("raw_data") and len(tensor.raw_data) == count:
        data = np.frombuffer(tensor.raw_data, np.uint8)
    elif tensor.data_location == onnx.TensorProto.EXTERNAL:
        info = ExternalDataInfo(tensor)
        data = np.memmap(folder / info.location, np.uint8, "r", info.offset or 0, (count,))
    else:
        return ()
    width = max(1, stored.bits // 8)
    matrix = data.reshape(math.prod(tensor.dims[:-2]), tensor.dims[-2], -1, width)[0]
    runs = [matrix[len(matrix) // 2, : _RUN // width].tobytes()]
    if stored.bits >= 8:
        runs.append(matrix[: _RUN // width, matrix.shape[1] // 2].tobytes())
    return tuple(runs) if all(len(set(run)) >= _LEAST_VARIETY for run in runs) else ()


def prove_network(
    stored: Sequence[str], weights: WeightFacts, facts: NetworkFacts, inputs: bool = False
) -> list[Proof]:
    """That the network asks for the formats at all: a wrong graph is refused before hours are spent on it.

    Args:
        stored: formats asked for, of which the first must be there.
        weights: of the ONNX file.
        facts: of the network.
        inputs: whether inputs of products were to be rounded, too.
    """
    first = stored[0]
    if first not in QUANTIZED:
        total, count = sum(facts.matrix.values()), facts.matrix[FORMATS[first].network]
        shares = ", ".join(f"{name} {n}" for name, n in facts.matrix.most_common()) or "none"
        return [Proof(f"matrix layers compute in {first}", f"{count} of {total} ({shares})", count > 0)]
    proofs = []
    for name in (first, *(other for other in stored[1:] if weights.sizes.get(other))):
        count = facts.dequantized[FORMATS[name].network]
        evidence = f"{count} layers that widen {name} input"
        proofs.append(Proof(f"the network reads {name} weights", evidence, count > 0))
    if inputs:
        count = facts.layers["QUANTIZE"]
        proofs.append(Proof("inputs of products are rounded to fp8", f"{count} layers that round", count > 0))
    return proofs


def prove_sums(path: Path, facts: NetworkFacts) -> list[Proof]:
    """That a rank's network sums over ranks wherever its graph does."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    wanted, found = sum(node.op_type == "DistCollective" for node in nodes), facts.layers["DIST_COLLECTIVE"]
    if not wanted:
        return []
    return [Proof("the network sums over ranks", f"{found} collectives, the graph has {wanted}", found == wanted)]


def prove_plugins(launches: int, facts: NetworkFacts) -> list[Proof]:
    """That every launch of a kernel became a plugin; nothing to show where there is none."""
    found = facts.layers[PLUGIN_LAYER]
    return (
        [Proof("every kernel is a plugin", f"{found} plugins of {launches} launches", found == launches)]
        if launches
        else []
    )


def prove_plan(
    path: Path,
    plan: PlanFacts,
    stored: Sequence[str],
    weights: WeightFacts,
    targets: Iterable[str],
    shown_targets: bool,
) -> list[Proof]:
    """The claims a finished plan must bear out."""
    proofs = []
    if plan.header_size:
        proofs.append(Proof("the plan is complete", f"{plan.size} bytes, header says {plan.header_size}", _whole(plan)))
    if shown_targets and plan.header_size:
        asked = tuple(name for name in MASK_BITS if name in set(targets))
        proofs.append(Proof("it is for the targets asked for", ", ".join(plan.targets), plan.targets == asked))
    for name in stored:
        if weights.sizes.get(name):
            proofs.append(_kept(plan, name, weights) if plan.constants else _same_bytes(path, name, weights))
    return proofs


def _whole(plan: PlanFacts) -> bool:
    return plan.size == plan.header_size


def _kept(plan: PlanFacts, stored: str, weights: WeightFacts) -> Proof:
    """Weights are stored in the format, and not in a wider type beside or instead of it.

    Widened weights raise the ratio of wider constants over that of the ONNX file; equal ratios mean that none were.
    """
    own, there = plan.constants.get(FORMATS[stored].plan, 0), weights.sizes[stored]
    wider = [name for name, one in FORMATS.items() if one.bits > FORMATS[stored].bits]
    over = sum(plan.constants.get(FORMATS[name].plan, 0) for name in wider)
    before = sum(weights.sizes.get(name, 0) for name in wider)
    limit = (before / there * _WIDER_ALLOWED + _ROUTERS) * own + _SMALL * max(1.0, own / there)
    evidence = (
        f"constants in the plan: {_sizes(plan.constants)}; in the ONNX file: {there} bytes of {stored}, {before} wider"
    )
    return Proof(f"weights are stored as {stored}", evidence, own > 0 and over <= limit)


def _sizes(constants: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sorted(constants.items(), key=lambda item: -item[1]))


def _same_bytes(path: Path, stored: str, weights: WeightFacts) -> Proof:
    claim, samples = f"weights are stored as {stored}", weights.samples[stored]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        found = sum(any(plan.find(run) >= 0 for run in runs) for runs in samples.values())
    if not samples:
        return Proof(claim, "no weight is varied enough to be recognised in the plan", True)
    return Proof(
        claim, f"bytes of {found} of {len(samples)} sampled weights occur in the plan", 2 * found >= len(samples)
    )


def prove_loads(module: Any, path: Path) -> Proof:
    """That the engine loads, and what TensorRT's inspector says of it. GPU only."""
    claim = "it loads on this machine's GPU"
    try:
        layers = json.loads(inspect_engine(module, path)).get("Layers", [])
    except (RuntimeError, ValueError) as e:
        return Proof(claim, str(e), False)
    types = Counter(re.findall(r"\b(?:FP4|FP8|BF16|FP16|FP32|Half|Float|BFloat16)\b", json.dumps(layers)))
    return Proof(claim, f"{len(layers)} layers; types named in them: {dict(types)}", True)


def inspect_engine(module: Any, path: Path) -> str:
    """The engine inspector's JSON. Needs a GPU the engine was built for, and the engine's own TensorRT version."""
    runtime = module.Runtime(module.Logger(module.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeError(f"{path} cannot be loaded on this GPU")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(module.LayerInformationFormat.JSON))
