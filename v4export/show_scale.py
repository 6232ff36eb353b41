"""What a model takes, as text, for people: plans, simulations and measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from v4export.show import mib, table

if TYPE_CHECKING:  # at run time these rooms are heavy, and nothing here needs more than their results
    from v4export.plan.foreseen import Cost
    from v4export.plan.simulate import Simulation
    from v4export.plan.verb import Plan
    from v4export.runtime.speed import Speed


def plan(found: Plan) -> str:
    """What a build will take: a row for each stage, and what is exact."""
    rows = [
        (name, f"~{mib(n.host)}", mib(n.disk) if n.disk else "", mib(n.device) if n.device else "",
         f"~{_time(n.seconds)}" if n.seconds else "")
        for name, n in found.stages.items()
    ]  # fmt: skip
    made = [n for name, n in found.stages.items() if name != "run"]
    rows.append(
        ("all", f"~{mib(max(n.host for n in made))}", mib(sum(n.disk for n in made)), "",
         f"~{_time(sum(n.seconds for n in made))}")
    )  # fmt: skip
    m, b, s = found.machine, found.bytes, found.sharding
    rows.append(("here", mib(m.free), mib(m.disk), mib(m.device) if m.device else "", ""))
    lines = [
        table([("stage", "memory", "disk", "device memory", "time"), *rows]),
        "",
        f"{found.precision}: {mib(int(b['pointed_bytes']))} of weights used where they lie, "
        f"{mib(int(b['written_bytes']))} written"
        + (f", {mib(int(b['cpu_bytes']))} once more for a CPU" if b["cpu_bytes"] else "")
        + (f"; {mib(int(b['beside_bytes']))} of tables read where they lie" if b["beside_bytes"] else ""),
        f"state: {b['state_bytes_per_token']:,} bytes for a token"
        + (f", and {mib(int(b['state_bytes_fixed']))} whatever the length" if b["state_bytes_fixed"] else ""),
    ]
    if s.ranks > 1:
        held = ((f"{r.layers[0]}:{r.layers[1]}", mib(r.weights), mib(r.state)) for r in found.ranks)
        title = f"{s.ranks} devices, {s.width} in a stage"
        lines += ["", title, table([("layers", "weights of a device", "state"), *held])]
    return "\n".join(lines)


def simulation(found: Simulation) -> str:
    """Tokens a second and memory, what they are made of, and what was assumed."""
    s, many = found.sharding, found.sharding.ranks
    rows = [
        (name, str(k.layers), f"{1e3 * k.seconds:.3f}", f"{k.bytes / 1e6:,.1f}", f"{k.operations / 1e9:,.2f}", k.bound)
        for name, k in found.kinds.items()
    ]
    head = ("kind", "layers", "ms a layer", "MB read", "GFLOP", "bound by")
    stages = ", ".join(f"{1e3 * t:.2f}" for t in found.stages_s)
    held = f"{mib(found.memory)} of {mib(found.has)}"
    return "\n".join(
        [
            table([head, *rows]),
            "",
            f"{many} x {found.device} (tp {s.tp}, ep {s.ep}, pp {s.pp}): ~{found.tokens_per_s:,.1f} tokens/s, "
            f"~{1e3 * found.tpot_s:.2f} ms from token to token",
            f"stages take {stages} ms, of which {1e3 * found.collectives_s:.2f} ms are collectives; the slowest waits "
            f"{found.bubble:.0%} of the time",
            f"the fullest device holds {held}",
            "",
            "assumed:",
            *(f"- {one}" for one in found.assumptions),
        ]
    )


def speed(found: Speed) -> str:
    """A measured run, as llama-bench prints it, and percentiles."""
    rates = [(name, f"{mean:,.2f} ± {off:,.2f}") for name, (mean, off) in found.rates.items()]
    times = [(name, *(f"{1e3 * one:,.2f}" for one in each.values())) for name, each in found.latencies.items()]
    head = "ms", *found.latencies["TTFT"]
    parts = [table([("test", "tokens/s"), *rates]), table([head, *times]), f"peak memory {found.peak_mib:,.0f} MiB"]
    if found.floor:
        f = found.floor
        read = f"{f.weights / 1e6:,.1f} MB of weights and {f.state / 1e6:,.1f} MB of cached rows"
        parts.append(f"floor: {read} at {f.bandwidth / 1e9:.1f} GB/s take {1e3 * f.seconds:,.2f} ms a token")
        if found.of_floor is not None:
            parts[-1] += f"; the median is at {found.of_floor:.0%} of that speed"
    if d := found.drafts:
        tokens = "the same tokens" if d.same else "other tokens, from some near tie on"
        accepted = f"{d.accepted} of {d.drafted} accepted ({d.acceptance:.0%})"
        parts.append(f"{d.most} drafted ahead: {accepted}, {d.speed_up:.2f}x as fast, {tokens}")
    return "\n\n".join(parts)


def speed_json(found: Speed) -> dict[str, Any]:
    """The same for programs, with the seconds of every step."""
    return {
        "rates": {n: {"tokens_per_s": mean, "deviation": off} for n, (mean, off) in found.rates.items()},
        "latencies_s": found.latencies,
        "prefill_s": found.prefill_s,
        "steps_s": found.steps_s,
        "drafts": vars(d) | {"acceptance": d.acceptance, "speed_up": d.speed_up} if (d := found.drafts) else None,
        "peak_mib": found.peak_mib,
        "floor": found.floor
        and {
            "weight_bytes": found.floor.weights,
            "state_bytes": found.floor.state,
            "bandwidth_bytes_per_s": found.floor.bandwidth,
            "seconds": found.floor.seconds,
            "share": found.of_floor,
        },
    }


def costs(found: Sequence[Cost]) -> str:
    """What stages were foreseen to take, and took."""
    rows = [
        (c.name, _or(c.foreseen_seconds, _time, "~"), _or(c.seconds, _time), _or(c.foreseen_mib, _of_mib, "~"),
         _or(c.mib, _of_mib), _or(c.foreseen_bytes or None, mib), _or(c.bytes or None, mib))
        for c in found
    ]  # fmt: skip
    head = ("stage", "time foreseen", "taken", "peak foreseen", "measured", "bytes foreseen", "written")
    return table([head, *rows]) if rows else "this bundle's build foresaw nothing"


def _or(value: Any, form: Callable[[Any], str], mark: str = "") -> str:
    return "" if value is None else mark + form(value)


def _of_mib(count: float) -> str:
    return mib(int(count * 2**20))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
