"""Whether what is needed is there, what is missing where it is not, and what would fit instead."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from v4export.config.sharding import Sharding
from v4export.engine.targets import Target
from v4export.errors import NotEnough, V4Error
from v4export.plan.sharding import ranks
from v4export.plan.stages import Need, needs, on_device
from v4export.plan.work import Work
from v4export.precision import NATIVE, PRECISIONS, native, precision

#: Recipes by what they lose on the trained example (docs/benchmarks.md, quality of recipes), the least first. One that
#: rounds inputs is not among them, since it has to be calibrated first.
BY_LOSS = ("fp32", "fp16", "bf16", "int8", "fp8", "mxfp8", "int4", "nvfp4", "mxfp4")
_MOST_DEVICES = 1024
_NODE = 8


@dataclass(frozen=True)
class Machine:
    """What there is, in bytes; None where it is not known.

    Attributes:
        total: memory, swap included.
        free: memory that is free now.
        disk: free where OUT will be.
        device: memory of one GPU of those that it will run on.
        folder: whose disk that is.
    """

    total: int
    free: int
    disk: int
    device: int | None = None
    folder: str = ""


@dataclass(frozen=True)
class Missing:
    """What a stage lacks: ``needed`` and ``has`` are bytes."""

    stage: str
    what: str
    needed: int
    has: int

    @property
    def nbytes(self) -> int:
        """How much is missing."""
        return self.needed - self.has

    def __str__(self) -> str:
        return (
            f"{self.stage}: {gib(self.nbytes)} of {self.what} missing, {gib(self.needed)} needed, {gib(self.has)} there"
        )


def this_machine(out: Path, device: int | None = None) -> Machine:
    """What this machine has now."""
    memory = psutil.virtual_memory()
    total = memory.total + psutil.swap_memory().total
    folder = _existing(out)
    return Machine(total, memory.available, shutil.disk_usage(folder).free, device, str(folder))


def elsewhere(checkpoint: Path, out: Path) -> bool:
    """Whether a checkpoint's shards cannot be linked, since OUT is on another file system."""
    return checkpoint.stat().st_dev != _existing(out).stat().st_dev


def _existing(out: Path) -> Path:
    """The folder, or the nearest above it that there is."""
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())


def missing(found: Mapping[str, Need], machine: Machine) -> list[Missing]:
    """What the prediction says is too little."""
    made = {name: need for name, need in found.items() if name != "run"}
    lacks = [Missing(name, "memory", need.host - need.mapped, machine.free) for name, need in found.items()]
    disk = sum(need.disk for need in made.values())
    lacks.append(Missing("build", "disk", disk, machine.disk))
    if machine.device is not None:
        lacks += [Missing(n, "device memory", need.device, machine.device) for n, need in found.items() if need.device]
    return [one for one in lacks if one.nbytes > 0]


def check_certain(found: Mapping[str, Need], machine: Machine) -> None:
    """Refuse a build that cannot end well: whose weights alone are more than the disk has left, or which needs more
    memory than the machine has at all.

    Raises:
        NotEnough: which stage lacks how much of what.
    """
    lacks = [Missing(name, "memory", need.least, machine.total) for name, need in found.items() if name != "run"]
    lacks.append(Missing("build", "disk", sum(need.certain_disk for need in found.values()), machine.disk))
    for one in lacks:
        if one.nbytes > 0:
            where = f"the disk of {machine.folder}" if one.what == "disk" else "this machine"
            raise NotEnough(f"{where} has too little {_ROOM[one.what]}", str(one), _ELSEWHERE[one.what])


_ROOM = {"memory": "memory", "disk": "room"}
_ELSEWHERE = {
    "memory": "use a machine with more, a narrower --precision, --layers 0:N, or leave the stage out "
    "(--no-engine, --no-verify); v4export plan says what would fit",
    "disk": "free some, choose another -o, or a --precision whose bytes the checkpoint has; v4export plan says more",
}


def smaller_recipe(work: Work, machine: Machine, target: Target | None) -> str | None:
    """The recipe that loses least among those that are narrower than the work's and fit; the checkpoint's own first."""
    config = work.config
    names = dict.fromkeys((native(config), *BY_LOSS))
    for name in names:
        if target and not target.has(PRECISIONS[name], plugins=True):
            continue
        try:
            other = replace(work, precision=precision(name, config))
            lighter = other.bytes.total < work.bytes.total
            if lighter and not missing(needs(other), machine):
                return NATIVE if name == native(config) else name
        except V4Error:
            continue  # rows that are no whole number of blocks
    return None


def larger_sharding(work: Work, machine: Machine) -> Sharding | None:
    """The fewest devices that hold it: first those of one node, then stages of whole nodes."""
    if machine.device is None:
        return None
    for sharding in _shardings():
        try:
            held = ranks(work.config, work.bytes.each, work.state, sharding)
        except V4Error:
            continue  # heads, experts or layers that cannot be cut so
        if on_device(work, held) <= machine.device:
            return sharding
    return None


def _shardings() -> Iterator[Sharding]:
    count = 1
    while count <= _MOST_DEVICES:
        within = min(count, _NODE)
        yield Sharding(within, within, count // within)
        count *= 2


def gib(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
