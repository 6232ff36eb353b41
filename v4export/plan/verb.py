"""``v4export plan``: what a build and its result take here, before any work; and what a build was foreseen to take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4export import presets
from v4export.checkpoint.audit import Weight, audit
from v4export.checkpoint.imagined import imagined
from v4export.config import ModelConfig
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.config.sharding import WHOLE, Sharding
from v4export.engine.options import EngineOptions
from v4export.engine.targets import Target, fallback
from v4export.errors import BadInput, NotEnough
from v4export.opened import longest, open_checkpoint
from v4export.package.bundle import MANIFEST, Bundle
from v4export.plan.devices import Device, target_of
from v4export.plan.efficiency import EFFICIENCIES, given
from v4export.plan.fits import Machine, Missing, elsewhere, gib, larger_sharding, missing, smaller_recipe, this_machine
from v4export.plan.sharding import Rank
from v4export.plan.simulate import Link, Simulation, simulate, spread
from v4export.plan.stages import Need, needs
from v4export.plan.work import Work
from v4export.precision import NATIVE, native
from v4export.precision import precision as find_precision
from v4export.state_contract import bytes_per_token, fixed_bytes


@dataclass(frozen=True)
class Plan:
    """What a build will take.

    Attributes:
        precision: name of the recipe.
        sharding: over how many devices the result is spread.
        stages: what each stage takes.
        bytes: of weights and state, exact.
        ranks: what a device of each stage of a pipeline holds.
        machine: what there is.
        missing: what is too little.
        advice: what would fit.
    """

    precision: str
    sharding: Sharding
    stages: dict[str, Need]
    bytes: dict[str, float]
    ranks: tuple[Rank, ...]
    machine: Machine
    missing: tuple[Missing, ...] = ()
    advice: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse where something is missing.

        Raises:
            NotEnough: says how much of what, and what would fit.
        """
        if self.missing:
            what = " and ".join(dict.fromkeys(one.what for one in self.missing))
            values = "\n  ".join(map(str, self.missing))
            raise NotEnough(f"there is too little {what}", values, "\n  ".join(self.advice))


def plan(
    model: str | Path,
    *,
    precision: str = "bf16",
    keep: Sequence[str] = (),
    max_seq_len: int | None = None,
    chosen: Chosen = UNCHANGED,
    targets: Sequence[str] = (),
    max_batch: int = 1,
    engine: bool = True,
    verify: bool = True,
    copy_weights: bool = False,
    cpu_weights: bool = True,
    sharding: Sharding = WHOLE,
    device_memory_gib: float | None = None,
    out: Path = Path(),
) -> Plan:
    """What building a model, and running it, will take; nothing but configuration and headers is read.

    Args:
        model: a checkpoint directory, or a preset's name.
        precision: a recipe, or ``native``.
        keep: exceptions to it.
        max_seq_len: longest sequence; the model's own limit or 4096, whichever is less, unless given.
        chosen: what is changed of the model.
        targets: capabilities or devices that it will run on.
        max_batch: most sequences at once.
        engine: whether an engine is built.
        verify: whether the graph is verified.
        copy_weights: copy shards instead of linking them.
        cpu_weights: write integer matrices once more for a CPU.
        sharding: how it is spread over devices.
        device_memory_gib: memory of one, in place of what the table of devices says.
        out: where the bundle will be.

    Raises:
        BadInput: the model, the recipe or a target is unknown, or the model cannot be spread so.
        NotSupported: the recipe cannot hold a matrix.
    """
    found = [target_of(name) for name in targets]
    config, weights, directory = _model(model, chosen)
    name = native(config) if precision == NATIVE else precision
    if engine and found:
        name, _ = fallback([target.name for target, _ in found], name)
    sizes = [device.memory_gib for _, device in found if device]
    memory = device_memory_gib or min(sizes, default=None)
    machine = this_machine(out, None if memory is None else int(memory * 2**30))
    work = Work(
        config,
        find_precision(name, config, keep),
        weights,
        longest(config, max_seq_len),
        EngineOptions(max_batch=max_batch),
        engine=engine,
        verify=verify,
        cpu_weights=cpu_weights,
        copied=copy_weights or (directory is not None and elsewhere(directory, out)),
        sharding=sharding,
        plugins=bool(found) and not found[0][0].rtx,
        free=machine.free,
    )
    return planned(work, machine, found[0][0] if found else None)


def simulated(
    model: str | Path,
    devices: int,
    device: Device,
    asked: Sharding,
    *,
    batch: int,
    context: int,
    micro_batches: int | None,
    precision: str | None,
    link: tuple[float | None, float],
    efficiency: float | None,
    costs: Path | None,
) -> Simulation:
    """A simulation, of a bundle's recipe or another; arguments as of ``api.simulate``."""
    if (Path(model) / MANIFEST).is_file():
        if precision is not None:
            raise BadInput("a bundle has its own precision", f"--precision {precision}", "leave it out")
        bundle = Bundle.open(Path(model))
        config, recipe, weights = bundle.config, bundle.precision, imagined(bundle.config)
    else:
        config, weights, _ = _model(model, UNCHANGED)
        recipe = find_precision(precision or NATIVE, config)
    work = Work(
        config,
        recipe,
        weights,
        context,
        EngineOptions(max_batch=batch),
        cpu_weights=False,
        sharding=spread(config, devices, asked),
        plugins=True,
    )
    return simulate(
        work,
        device,
        batch=batch,
        context=context,
        link=Link(link[0] or device.link_gbs, link[1]),
        micro_batches=micro_batches,
        efficiencies=EFFICIENCIES if efficiency is None else given(efficiency),
        costs=None if costs is None else _read_costs(costs),
    )


def _read_costs(file: Path) -> dict[str, float]:
    """Kind of layer -> seconds."""
    try:
        found = json.loads(file.read_text())
        return {str(name): float(seconds) for name, seconds in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"cannot read {file}", str(error), 'give JSON such as {"routed": 0.0004}') from error


def planned(work: Work, machine: Machine, target: Target | None = None) -> Plan:
    """The plan of some work on a machine."""
    stages = needs(work)
    lacks = missing(stages, machine)
    return Plan(
        work.precision.name,
        work.sharding,
        stages,
        exact(work),
        tuple(work.ranks),
        machine,
        tuple(lacks),
        tuple(_advice(work, machine, target, lacks)),
    )


def exact(work: Work) -> dict[str, float]:
    """Bytes that follow from shapes and formats alone."""
    b, config = work.bytes, work.config
    return {
        "pointed_bytes": b.pointed_bytes,
        "written_bytes": b.written_bytes,
        "cpu_bytes": b.cpu,
        "beside_bytes": b.beside,
        "state_bytes_per_token": bytes_per_token(config, work.itemsize),
        "state_bytes_fixed": fixed_bytes(config, work.itemsize),
    }


def _advice(work: Work, machine: Machine, target: Target | None, lacks: Sequence[Missing]) -> list[str]:
    """What would fit, a sentence each."""
    if not lacks:
        return []
    said = []
    recipe = smaller_recipe(work, machine, target)
    if recipe:
        said.append(f"--precision {recipe} fits")
    if any(one.what == "device memory" for one in lacks):
        s = larger_sharding(work, machine)
        if s:
            said.append(f"{s.ranks} such devices hold it: --tp {s.tp} --ep {s.ep} --pp {s.pp}")
    elsewhere = [one for one in lacks if one.what != "device memory"]
    for what in dict.fromkeys(one.what for one in elsewhere):
        most = max(one.needed for one in elsewhere if one.what == what)
        said.append(f"a machine with {gib(most)} of free {what} will do")
    flags = [f"--no-{one.stage}" for one in elsewhere if one.stage in ("verify", "engine")]
    if flags:
        said.append(f"{' '.join(flags)} leaves out what can be done later, on another machine")
    return said


def _model(model: str | Path, chosen: Chosen) -> tuple[ModelConfig, dict[str, Weight], Path | None]:
    """A model, its weights as they are stored or would be, and the checkpoint's directory."""
    if not Path(model).exists() and str(model) in presets.names():
        config = chosen.of(presets.load(str(model)))
        return config, imagined(config), None
    checkpoint = open_checkpoint(model, chosen)
    return checkpoint.config, audit(checkpoint, scan_values=False).weights, checkpoint.directory
