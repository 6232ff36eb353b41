"""What a build was foreseen to take, for its manifest, and beside it what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4export.checkpoint.audit import audit
from v4export.checkpoint.index import Checkpoint
from v4export.config.sharding import Sharding
from v4export.engine.options import DEFAULT_ENGINE, ENGINE_SUFFIX, EngineOptions
from v4export.graphs.shards import FOLDER
from v4export.plain import plain
from v4export.plan.fits import check_certain, elsewhere, this_machine
from v4export.plan.rates import MIB
from v4export.plan.stages import Need, needs
from v4export.plan.work import Work
from v4export.precision import Precision


@dataclass(frozen=True)
class Cost:
    """What a stage was foreseen to take, and took: None where nobody foresaw it, or it has not come to that.

    Attributes:
        name: of the stage.
        foreseen_seconds, seconds: time.
        foreseen_mib, mib: peak memory of the process so far, MiB.
        foreseen_bytes, bytes: written.
    """

    name: str
    foreseen_seconds: float | None
    seconds: float | None
    foreseen_mib: float | None
    mib: float | None
    foreseen_bytes: int | None
    bytes: int | None


def foresee(
    checkpoint: Checkpoint,
    precision: Precision,
    max_seq_len: int,
    out: Path,
    engine: EngineOptions | None,
    *,
    verify: bool,
    copy_weights: bool,
    cpu_weights: bool,
    sharding: Sharding,
) -> dict[str, Any]:
    """What the stages of a build will take, as its manifest has it.

    Raises:
        NotEnough: the build cannot end well, as the bytes of its weights say.
    """
    machine = this_machine(out)
    work = Work(
        checkpoint.config,
        precision,
        audit(checkpoint, scan_values=False).weights,
        max_seq_len,
        engine or DEFAULT_ENGINE,
        engine=engine is not None,
        verify=verify,
        cpu_weights=cpu_weights,
        copied=copy_weights or elsewhere(checkpoint.directory, out),
        sharding=sharding,
        free=machine.free,
    )
    found = needs(work)
    check_certain(found, machine)
    return recorded(found)


def recorded(found: Mapping[str, Need]) -> dict[str, Any]:
    """Stage -> seconds, peak in MiB and bytes. What is measured is a process's peak so far, and so is this."""
    made, peak = {}, 0
    for name in (name for name in found if name != "run"):
        need = found[name]
        peak = max(peak, need.host)
        made[name] = {"seconds": need.seconds, "peak_mib": peak / MIB, "bytes": need.disk}
    return made


def compared(folder: Path, facts: Mapping[str, Any]) -> list[Cost]:
    """A row for each stage, of what a manifest says; bundles made by a version that foresaw nothing have no rows."""
    facts = plain(facts)
    if "plan" not in facts:
        return []
    foreseen, took = facts["plan"], {one["name"]: one for one in facts.get("stages", ())}
    written = _written(folder, facts)
    rows = []
    for name in dict.fromkeys((*foreseen, *took)):
        was, done = foreseen.get(name, {}), took.get(name, {})
        rows.append(
            Cost(
                name,
                was.get("seconds"),
                done.get("seconds"),
                was.get("peak_mib"),
                done.get("peak_mib"),
                was.get("bytes"),
                written.get(name) if done else None,
            )
        )
    return rows


def _written(folder: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """Stage -> bytes that it left."""
    graphs = facts["graphs"]
    engines = facts.get("engines", {}).values()
    multipliers = (folder / FOLDER).glob(f"*{ENGINE_SUFFIX}-*")
    return {
        "weights": graphs["written_bytes"],
        "graph": sum((folder / name).stat().st_size for name in graphs["files"]),
        "weights for a CPU": graphs["cpu_bytes"],
        "engine": sum(one["bytes"] for one in engines) + sum(file.stat().st_size for file in multipliers),
    }
