"""What each stage of a build takes: one function a stage, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from v4export.checkpoint.count import parameter_counts
from v4export.graphs.export import PORTABLE
from v4export.plan import rates
from v4export.plan.sharding import Rank
from v4export.plan.work import Work

_FLOAT32 = 4


@dataclass(frozen=True)
class Need:
    """What a stage takes.

    Attributes:
        host: peak memory of its process, in bytes, mapped pages of weights included.
        mapped: how much of it is such pages, which the system can drop.
        least: memory that it cannot do without, in bytes; what is certain of ``host``.
        disk: bytes written.
        certain_disk: bytes written that are exact.
        device: memory of one GPU, in bytes.
        seconds: on a machine as the rates were measured on.
    """

    host: int
    mapped: int = 0
    least: int = 0
    disk: int = 0
    certain_disk: int = 0
    device: int = 0
    seconds: float = 0.0


def _audit(work: Work) -> Need:
    """Reads every weight once, in windows."""
    return Need(rates.BASE_BYTES, seconds=work.stored / rates.SCAN)


def _trace(work: Work) -> Need:
    """Depends on kinds of layers alone."""
    held = rates.FIRST_TRACE_BYTES + work.parts * rates.TRACE_BYTES
    return Need(rates.BASE_BYTES + held, seconds=rates.FIRST_TRACE_S + work.parts * rates.TRACE_S)


def _weights(work: Work) -> Need:
    """Converts what is stored otherwise, some rows at a time; links, or copies, what is not."""
    copied = work.bytes.shard_bytes if work.copied else 0
    seconds = sum(numbers / rates.NUMBERS[name] for name, numbers in work.bytes.converted.items())
    seconds += (work.bytes.multipliers + copied) / rates.MULTIPLIERS
    window = rates.WINDOW_COPIES * rates.WINDOW_ROWS * work.widest * _FLOAT32 if work.bytes.written_bytes else 0
    disk = work.bytes.written_bytes + copied
    return Need(_trace(work).host + window, disk=disk, certain_disk=disk, seconds=seconds)


def _graph(work: Work) -> Need:
    """Names, shapes and places of every tensor, of each graph and its copy for a CPU."""
    tensors = work.bytes.tensors
    layers = 2 * rates.GRAPH_LAYER_BYTES * work.config.num_layers
    disk = len(work.graphs) * (tensors * (rates.GRAPH_TENSOR_BYTES + rates.CPU_TENSOR_BYTES) + layers)
    seconds = 2 * len(work.graphs) * tensors * rates.GRAPH_TENSOR_S
    return Need(_trace(work).host + tensors * rates.TENSOR_BYTES, disk=disk, seconds=seconds)


def _cpu(work: Work) -> Need:
    """Integer matrices once more, an expert at a time."""
    cpu = work.bytes.cpu
    return Need(_graph(work).host, disk=cpu, certain_disk=cpu, seconds=cpu / rates.REPACK)


def _verify(work: Work) -> Need:
    """A layer of the definition in float32, beside the graph over its own weights; and beside the ops' bodies, which
    stack experts, where there is memory for that.
    """
    reference, config = work.largest_layer * _FLOAT32, work.config
    stacks = len(config.moe_layers) * config.num_experts * config.expert_parameters * _FLOAT32
    copies = rates.BODIES_NARROW if work.precision.expert.scaled else rates.BODIES_PLAIN
    bodies = copies * stacks if rates.BODIES_PLAIN * stacks < work.free // 2 else 0
    host = _graph(work).host + rates.VERIFY_BYTES + rates.VERIFY_COPIES * reference + on_cpu(work) + bodies
    numbers = sum(math.prod(w.shape) for w in work.inside.values())
    gflops = 2e-9 * rates.VERIFY_TOKENS * parameter_counts(config).active
    seconds = numbers * rates.VERIFY_NUMBER_S + gflops * rates.VERIFY_GFLOP_S
    seconds += (config.state_layers + config.drafts) * rates.VERIFY_LAYER_S + (
        rates.BODIES_S * stacks / _FLOAT32 if bodies else 0.0
    )
    return Need(host, mapped=work.bytes.total, least=reference, seconds=seconds)


def on_cpu(work: Work) -> int:
    """Bytes that onnxruntime holds of the weights: as they are stored, and widened to float32 when a graph is loaded,
    but for experts in narrow formats, which are widened when they are chosen.
    """
    total = work.bytes.total
    for name, weight in work.inside.items():
        format = work.precision.format_of(name, weight.role)
        if format.dtype != "float32" and not (weight.role == "expert" and format.scaled):
            total += _FLOAT32 * math.prod(weight.shape)
    return total


def _engine(work: Work) -> Need:
    """Weights go through the builder's memory into the engine, a graph at a time."""
    largest, layers = max(work.engines.values()), work.config.num_layers
    total = sum(work.engines.values())
    kernels = len(work.engines) * layers * rates.ENGINE_LAYER_BYTES
    host = rates.BASE_BYTES + math.ceil(rates.ENGINE_MEMORY * largest) + kernels
    return Need(
        host,
        least=math.ceil(rates.ENGINE_MEMORY_LEAST * largest),
        disk=math.ceil(rates.ENGINE_OVER_WEIGHTS * total) + kernels + work.bytes.for_engines,
        certain_disk=work.engines[PORTABLE] + work.bytes.for_engines,
        seconds=total / rates.ENGINE + len(work.engines) * layers * rates.ENGINE_LAYER_S,
    )


def _run(work: Work) -> Need:
    """Nothing but a device's memory counts."""
    return Need(rates.BASE_BYTES, device=on_device(work, work.ranks))


def on_device(work: Work, ranks: Sequence[Rank]) -> int:
    """Bytes of the fullest device: its weights, its share of the state, a step's scratch memory and the libraries."""
    return max(rank.nbytes for rank in ranks) + work.scratch + rates.CONTEXT_BYTES


#: Every stage by its name in a manifest, and what it takes; ``run`` is what comes after.
STAGES: dict[str, Callable[[Work], Need]] = {
    "audit": _audit,
    "trace": _trace,
    "weights": _weights,
    "graph": _graph,
    "weights for a CPU": _cpu,
    "verify": _verify,
    "engine": _engine,
    "run": _run,
}


def needs(work: Work) -> dict[str, Need]:
    """What each stage of a build takes, and running what it makes."""
    absent = {
        "weights for a CPU": not work.bytes.cpu,
        "verify": not work.verify,
        "engine": not work.engines,
    }
    return {name: stage(work) for name, stage in STAGES.items() if not absent.get(name)}
