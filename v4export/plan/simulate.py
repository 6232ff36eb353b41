"""Tokens a second, and memory, on devices that are not there: rooflines of layers, collectives, and a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from v4export.config import ModelConfig
from v4export.config.sharding import Sharding
from v4export.errors import BadInput, NotEnough
from v4export.plan.devices import Device
from v4export.plan.efficiency import EFFICIENCIES, Efficiency
from v4export.plan.fits import Missing
from v4export.plan.loads import HEAD, Load, Loads, experts_hit
from v4export.plan.sharding import Rank
from v4export.plan.stages import on_device
from v4export.plan.work import Work

#: Collectives of a layer: behind attention, and behind the feed-forward half.
COLLECTIVES = 2
_NODE = 8


@dataclass(frozen=True)
class Link:
    """Between two devices: 1e9 bytes a second in one direction, and microseconds that each collective takes besides."""

    gbs: float
    us: float

    def all_reduce(self, nbytes: float, devices: int) -> float:
        """Seconds of a ring's."""
        return 0.0 if devices == 1 else 2 * (devices - 1) / devices * nbytes / (self.gbs * 1e9) + self.us * 1e-6

    def send(self, nbytes: float) -> float:
        """Seconds to the next device."""
        return nbytes / (self.gbs * 1e9) + self.us * 1e-6


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how many there are, seconds of one without collectives, and what binds its parts."""

    layers: int
    seconds: float
    bytes: float
    operations: float
    bound: str


@dataclass(frozen=True)
class Simulation:
    """What a decode step comes to.

    Attributes:
        device: name.
        sharding: over how many of them.
        tokens_per_s: of all sequences.
        tpot_s: seconds from one token of a sequence to its next.
        bubble: share of time in which the slowest stage waits.
        collectives_s: seconds of a micro-batch's collectives and sends, all stages.
        stages_s: seconds of a micro-batch in each stage.
        kinds: by name; ``head`` is one, too.
        memory: bytes of the fullest device, of which ``has`` bytes are there.
        has: bytes of a device's memory.
        ranks: what a device of each stage holds.
        assumptions: everything that went in, a sentence each.
    """

    device: str
    sharding: Sharding
    tokens_per_s: float
    tpot_s: float
    bubble: float
    collectives_s: float
    stages_s: tuple[float, ...]
    kinds: dict[str, Kind]
    memory: int
    has: int
    ranks: tuple[Rank, ...]
    assumptions: tuple[str, ...] = field(default=())

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            NotEnough: says how much is missing.
        """
        lacks = Missing("run", "device memory", self.memory, self.has)
        if lacks.nbytes > 0:
            raise NotEnough(
                f"{self.sharding.ranks} x {self.device} do not hold the model",
                str(lacks),
                "simulate more devices or a narrower --precision; v4export plan says what fits",
            )


def spread(config: ModelConfig, devices: int, asked: Sharding) -> Sharding:
    """How so many devices are used: as asked, or whole nodes as stages with as many in each as can share heads.

    Raises:
        BadInput: what was asked is another number, or the model cannot be cut so.
    """
    if asked.ranks not in (1, devices):
        raise BadInput(
            "devices do not add up",
            f"--simulate {devices}; max(tp, ep) x pp = {asked.width} x {asked.pp} = {asked.ranks}",
            "leave --tp, --ep and --pp out, or make them agree",
        )
    candidates = [asked] if asked.ranks == devices else [Sharding(n, n, devices // n) for n in _divisors(devices)]
    for number, one in enumerate(candidates, 1):
        try:
            one.check(config)
        except BadInput:
            if number == len(candidates):
                raise
        else:
            return one
    raise AssertionError(f"{devices} has no divisor")


def _divisors(count: int) -> list[int]:
    return [n for n in range(min(count, _NODE), 0, -1) if count % n == 0]


def simulate(
    work: Work,
    device: Device,
    *,
    batch: int,
    context: int,
    link: Link,
    micro_batches: int | None = None,
    efficiencies: Mapping[str, Efficiency] = EFFICIENCIES,
    costs: Mapping[str, float] | None = None,
) -> Simulation:
    """One decoded token for each of ``batch`` sequences of ``context`` cached tokens.

    Args:
        work: the model, its recipe and its sharding.
        device: what runs it.
        batch: sequences.
        context: cached tokens of each.
        link: between devices.
        micro_batches: that a batch is cut into for a pipeline; as many as there are stages, unless given.
        efficiencies: of each part, over the data sheet.
        costs: measured seconds of a layer, by its kind, and of ``head``, in place of the roofline.

    Raises:
        BadInput: a number does not make sense, or costs lack a kind of layer.
    """
    config, sharding, measured = work.config, work.sharding, costs or {}
    count = min(micro_batches or sharding.pp, batch)
    size = -(-batch // count)
    loads, kinds = Loads(work), _kinds(config)
    _check_costs(measured, kinds)
    found: dict[str, Kind] = {}
    for name, layers in kinds.items():
        parts = loads.head(size) if name == HEAD else loads.layer(layers[0], size, context)
        seconds, bound = _roofline(parts, device, efficiencies)
        total = sum(parts.values(), Load())
        if name in measured:
            seconds, bound = measured[name], "measured"
        found[name] = Kind(len(layers), seconds, total.bytes, total.operations, bound)
    hidden = size * config.hidden_size * work.itemsize
    reduce = COLLECTIVES * link.all_reduce(hidden, sharding.width)
    send = link.send(size * math.prod(config.hidden_shape) * work.itemsize)
    layer_kind = {layer: name for name, layers in kinds.items() for layer in layers if name != HEAD}
    stages, wire = [], 0.0
    for number, rank in enumerate(work.ranks):
        own = [layer_kind[layer] for layer in range(*rank.layers)]
        last = number == len(work.ranks) - 1
        between = len(own) * reduce + (0.0 if last else send)
        stages.append(sum(found[name].seconds for name in own) + between + (found[HEAD].seconds if last else 0.0))
        wire += between
    # A micro-batch's next token waits for its last, and a stage for its turn.
    period = max(sum(stages), count * max(stages))
    return Simulation(
        device.name,
        sharding,
        batch / period,
        period,
        1 - count * max(stages) / period,
        wire,
        tuple(stages),
        found,
        on_device(work, work.ranks),
        int(device.memory_gib * 2**30),
        tuple(work.ranks),
        tuple(_assumptions(work, device, batch, context, link, count, efficiencies, measured)),
    )


def _kinds(config: ModelConfig) -> dict[str, list[int]]:
    """Kinds of layers, and the layers; the head is one at the end."""
    kinds: dict[str, list[int]] = {}
    for layer in range(config.num_layers):
        kinds.setdefault(config.kind(layer), []).append(layer)
    return kinds | {HEAD: [config.num_layers]}


def _check_costs(costs: Mapping[str, float], kinds: Mapping[str, Sequence[int]]) -> None:
    unknown, bad = costs.keys() - kinds.keys(), [n for n, v in costs.items() if not v > 0]
    if unknown or bad or (costs and kinds.keys() - costs.keys() - {HEAD}):
        raise BadInput(
            "measured costs are not those of this model's layers",
            f"given: {', '.join(sorted(costs))}; kinds: {', '.join(kinds)}",
            "give seconds above 0 for every kind, and for the head",
        )


def _roofline(parts: Mapping[str, Load], device: Device, efficiencies: Mapping[str, Efficiency]) -> tuple[float, str]:
    """Seconds of all parts one after another, and what binds most of that time."""
    spent = {"bandwidth": 0.0, "products": 0.0}
    for part, load in parts.items():
        share = efficiencies[part].share
        times = {
            "bandwidth": load.bytes / (device.bandwidth_gbs * 1e9 * share),
            "products": load.operations / (device.tflops * 1e12 * share),
        }
        binding = max(times, key=lambda name: times[name])
        spent[binding] += times[binding]
    return sum(spent.values()), max(spent, key=lambda name: spent[name])


def _assumptions(
    work: Work,
    device: Device,
    batch: int,
    context: int,
    link: Link,
    count: int,
    efficiencies: Mapping[str, Efficiency],
    measured: Mapping[str, float],
) -> list[str]:
    s, c = work.sharding, work.config
    rates = f"{device.bandwidth_gbs:,.0f} GB/s, {device.tflops:,.0f} TFLOP/s of bf16, {device.memory_gib:g} GiB"
    said = [
        f"{device.name}: {rates} (data sheet)",
        f"{batch} sequences of {context:,} cached tokens, {work.precision.name}; decoded in step, without thoughts",
        "ops are kernels that gather nothing, one after another, each bound by bandwidth or by products",
    ]
    if c.moe_layers:
        size = -(-batch // count)
        hit = f"{experts_hit(c.num_experts, c.experts_per_token, size):.1f} of {c.num_experts}"
        said.append(f"{size} tokens choose {hit} experts, freely and evenly; devices have equal shares of them")
    if measured:
        said.append("layers take the seconds of --costs, measured on a device that holds its share of them")
    else:
        said += [f"{part}: {e.share:.0%} of the roofline, {e.source}" for part, e in efficiencies.items()]
    wire = f"{link.gbs:g} GB/s and {link.us:g} us"
    if s.width > 1:
        said.append(
            f"{COLLECTIVES} ring all-reduces a layer among {s.width} devices, {wire} each, hidden behind nothing"
        )
    if s.pp > 1:
        said.append(f"{s.pp} stages, {count} micro-batches; a hidden state is sent at {wire}")
    if c.engram:
        said.append("Engram's rows are found on the host meanwhile")
    return said
