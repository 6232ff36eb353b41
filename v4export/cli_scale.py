"""Commands that say what a model takes: before a build, and on devices that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from v4export import show_scale as show
from v4export.cli_options import (
    batch_option,
    executor_options,
    json_option,
    model_options,
    options,
    out_folder,
    print_result,
    quiet_option,
    sharding_options,
    target_option,
)
from v4export.progress import Stages

#: What a measurement is told, and a simulation is not.
_MEASURED = (
    *("prompt_tokens", "new_tokens", "repetitions", "draft_max", "threads"),
    *("executor", "cuda_graphs", "kernels", "check_files"),
)

_plan_options = options(
    click.argument("model"),
    model_options,
    target_option,
    click.option("--device-memory-gib", type=float, help="Of one GPU.  [default: that of the --target, if a device]"),
    batch_option,
    sharding_options,
    click.option("--no-engine", is_flag=True, help="No engine is to be built."),
    click.option("--no-verify", is_flag=True, help="The graph is not to be verified."),
    click.option("-o", "--out", type=out_folder, default=Path(), help="Where the bundle will be.  [default: here]"),
    json_option,
)


@click.command()
@_plan_options
def plan(model: str, as_json: bool, **given: Any) -> None:
    """Say what building MODEL takes, stage by stage, before any work: memory, disk, GPU memory and time.

    MODEL is a checkpoint directory, of which only headers are read, or a preset. Bytes of weights and state are exact,
    times and memory are estimates (~). The exit code is 3 where this machine, or the --target, has too little, and the
    message says how much is missing and what would fit. Of a finished bundle, says what was foreseen and what it took.
    """
    from v4export import api

    if api.is_bundle(model):
        costs = api.costs(model)
        return print_result(as_json, {"costs": costs}, show.costs(costs))
    found = api.plan(model, **given)
    print_result(as_json, found, show.plan(found))
    found.check()


@click.command()
@click.argument("model")
@click.option("-p", "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of a prompt.")
@click.option("-n", "--new-tokens", type=click.IntRange(1), default=128, show_default=True, help="After it.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--draft-max", type=click.IntRange(0), metavar="N", help="Run once more with N drafted ahead.  [default: 1]"
)
@click.option("-t", "--threads", type=click.IntRange(0), default=0, help="Of onnxruntime; 0 lets it choose.")
@click.option("--device", help="cpu or cuda; of a simulation h200, rtx4090, ...  [default: cpu; h200]")
@executor_options
@click.option("--simulate", "devices", type=click.IntRange(1), metavar="N", help="On N devices, without any.")
@sharding_options
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences, simulated.")
@click.option("--context", type=click.IntRange(1), default=4096, show_default=True, help="Cached tokens of each.")
@click.option("--micro-batches", type=click.IntRange(1), help="Of a pipeline.  [default: as many as stages]")
@click.option("--precision", help="Recipe of a MODEL that is no bundle.  [default: native]")
@click.option("--link-gbs", type=click.FloatRange(0, min_open=True), help="GB/s between devices, in one direction.")
@click.option("--link-us", type=click.FloatRange(0), default=10.0, show_default=True, help="Of each collective.")
@click.option(
    "--efficiency", type=click.FloatRange(0, 1, min_open=True), help="Share of the data sheet, in place of the table's."
)
@click.option("--costs", type=click.Path(path_type=Path), help="JSON: kind of layer -> measured seconds.")
@quiet_option
@json_option
def bench(model: str, devices: int | None, as_json: bool, quiet: bool, device: str | None, **given: Any) -> None:
    """Measure a bundle on this machine, prompt and new tokens as llama-bench does; or simulate N devices.

    MODEL is a bundle; to simulate, a checkpoint directory or a preset will do. A simulation prints what it assumes: a
    roofline of each kind of layer at a device's bandwidth and rate of products, collectives, and a pipeline.
    """
    from v4export import api

    measuring = {name: given.pop(name) for name in _MEASURED}
    if devices is None:
        speed = api.bench(model, device=device or "cpu", stages=Stages(quiet=quiet), **measuring)
        return print_result(as_json, show.speed_json(speed), show.speed(speed))
    found = api.simulate(model, devices, device=device or "h200", **given)
    print_result(as_json, found, show.simulation(found))
    found.check()
