"""The command line: one command a verb, which parses, calls one function of ``v4export.api``, and prints its result."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import click

from v4export import cli_bisect, cli_package, cli_scale, show
from v4export.cli_options import (
    batch_option,
    executor_options,
    json_option,
    layers_of,
    model_options,
    options,
    print_result,
    prompt_cache_options,
    quiet_option,
    refuse_beside,
    sharding_options,
    target_option,
)
from v4export.config.chosen import AUTO, FP8
from v4export.errors import BadInput, NotEnough, NumbersDiffer, V4Error, broken
from v4export.precision import format_rows, recipe_rows
from v4export.progress import Stages

_EXPLAINED = {
    name: f"--{name} is not a flag here: TensorRT engines are strongly typed, so the precision is part of the graph. "
    f"Use --precision {name} when exporting."
    for name in ("fp16", "bf16", "fp8", "int8", "best")
}


class Interrupted(BaseException):
    """The process was asked to stop."""


def main() -> NoReturn:
    """Entry point: runs a command and turns errors into messages and exit codes."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(prog_name="v4export", standalone_mode=False)
    except V4Error as error:
        _fail(_with_notes(str(error), error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt, Interrupted) as stop:
        # click hides what it was stopped by behind an exception of its own.
        cause = stop.__cause__ or stop
        kept = hasattr(cause, "__notes__")
        _fail(_with_notes("interrupted" if kept else "interrupted; nothing was left behind", cause), 130)
    except OSError as error:
        _fail(_with_notes(str(broken(error)), error), broken(error).exit_code)
    except MemoryError as error:
        short = NotEnough("this machine's memory does not suffice", fix="use a machine with more, or --layers 0:N")
        _fail(_with_notes(str(short), error), short.exit_code)
    sys.exit(0)


def _stop(*_: object) -> NoReturn:
    raise Interrupted


def _with_notes(message: str, error: BaseException) -> str:
    return "\n  ".join([message, *getattr(error, "__notes__", ())])


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _explain(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise BadInput(_EXPLAINED[param.name or ""])


_device = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
_out = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")

_export_options = options(
    model_options,
    click.option(
        "--calibrate",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Text, or scales of `v4export calibrate`, for recipes that round inputs.",
    ),
    sharding_options,
    click.option(
        "--expert-load",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help='JSON: {"3": [17, 4, ..], ..}, how often each expert of a layer is chosen; --ep deals by it.',
    ),
    click.option(
        "--no-scan", "scan_values", flag_value=False, default=True, help="Do not look for NaN in the weights."
    ),
    click.option("--force", is_flag=True, help="Replace OUT if it is a bundle."),
    click.option("--resume", is_flag=True, help="Go on with what a build of OUT has left that was stopped."),
    *(click.option(f"--{n}", n, is_flag=True, callback=_explain, expose_value=False, hidden=True) for n in _EXPLAINED),
    json_option,
    quiet_option,
)

_engine_options = options(
    target_option,
    click.option("--backend", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Which TensorRT."),
    batch_option,
    click.option(
        "--max-chunk", type=click.IntRange(1), help="New tokens of a prefill step.  [default: 1 GiB of scratch]"
    ),
    click.option("--plugins", help="auto | aot | library | none: how our kernels get in.  [default: auto]"),
    click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory when the engine runs."),
    click.option("--refit", is_flag=True, help="Let programs replace the engine's weights; RTX needs a driver for it."),
    click.option("--workspace-gib", type=float, help="Limit on the builder's scratch memory."),
    click.option(
        "--minShapes", "min_shapes", metavar="NAME:AxB,..", help="As trtexec: shapes of a profile of your own."
    ),
    click.option("--optShapes", "opt_shapes", metavar="NAME:AxB,.."),
    click.option("--maxShapes", "max_shapes", metavar="NAME:AxB,.."),
    click.option("-v", "--verbose", is_flag=True, help="TensorRT's log, too, on stderr."),
)
#: What may be given beside ``--from``.
_REPEATED = ("model", "out", "manifest", "force", "resume", "as_json", "quiet", "verbose")
_ENGINE_NAMES = (
    *("targets", "backend", "max_batch", "max_chunk", "workspace_gib", "plugins"),
    *("weight_streaming", "refit"),
)


def _engine(given: dict[str, Any]) -> Any:
    """EngineOptions of the options that are its, taken out of ``given``."""
    from v4export.engine.options import EngineOptions
    from v4export.engine.profiles import ShapeOverride

    texts = [given.pop(f"{kind}_shapes") for kind in ("min", "opt", "max")]
    mine = {name: given.pop(name) for name in _ENGINE_NAMES}
    mine["targets"] = mine["targets"] or None
    return EngineOptions(**mine, shapes=ShapeOverride.parse(*texts) if any(texts) else None)


def _shared(given: dict[str, Any]) -> dict[str, Any]:
    """Of the options that say how a model is shared among ranks, taken out of ``given``, what a build is told."""
    from v4export.config.sharding import Sharding

    return {"sharding": Sharding(**{name: given.pop(name) for name in ("tp", "ep", "pp")})}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="v4export")
def cli() -> None:
    """From a DeepSeek-family mixture-of-experts checkpoint to a checked ONNX graph and TensorRT engines."""


@cli.command()
@click.argument("model", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--from",
    "manifest",
    metavar="OUT/v4export.json",
    type=click.Path(path_type=Path),
    help="Repeat that build, with its options; MODEL, if its checkpoint has moved.  [default OUT: OUT.again]",
)
@_export_options
@_engine_options
@click.option("--no-engine", is_flag=True, help="Stop after the graph is verified.")
@click.option("--no-verify", is_flag=True, help="Do not compare the graph with the PyTorch definition.")
@_device
@click.pass_context
def build(
    ctx: click.Context,
    manifest: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_engine: bool,
    no_verify: bool,
    **given: Any,
) -> None:
    """Audit, export, verify, build the engine, and write a report: the whole way from MODEL to a bundle.

    MODEL is a Hugging Face checkpoint directory. OUT appears whole, or not at all. What is finished of a build that was
    stopped, or that met a full disk, is kept: the same command with --resume goes on with it.
    """
    from v4export import api
    from v4export.package.bundle import MANIFEST, Bundle

    start = time.monotonic()
    how: dict[str, Any] = {
        "stages": Stages(quiet=quiet),
        "on_line": _log if verbose else None,
        "command": _command(),
    }
    if manifest:
        refuse_beside(ctx, _REPEATED, "--from has all options from the build that it repeats", "leave them out")
        first = Bundle.open(manifest.parent if manifest.name == MANIFEST else manifest)
        found = api.repeat(
            first,
            given["out"],
            model=given["model"],
            force=given["force"],
            resume=given["resume"],
            on_boundary=_print_boundary(as_json, first.precision.name),
            **how,
        )
        print_result(as_json, found, show.repeated(found, time.monotonic() - start, _command()))
        return found.check()
    for name, spelt in (("model", "argument 'MODEL'"), ("out", "option '-o' / '--out'")):
        if given[name] is None:
            raise click.UsageError(f"Missing {spelt}.", ctx)
    asked, shared = _engine(given), _shared(given)
    engine = None if no_engine else asked
    shown = api.recipe_for(given["model"], given["precision"], engine)[0]
    try:
        built = api.build(
            given.pop("model"),
            given.pop("out"),
            engine=engine,
            verify=not no_verify,
            on_boundary=_print_boundary(as_json, shown),
            **how,
            **shared,
            **given,
        )
    except NumbersDiffer as error:
        print_result(
            as_json, {"verdict": error.summary}, show.verdict(error.summary, time.monotonic() - start, _command())
        )
        raise
    print_result(as_json, built, show.built(built, time.monotonic() - start, _command()))


@cli.command()
@click.argument("model")
@_out
@_export_options
def export(as_json: bool, quiet: bool, **given: Any) -> None:
    """Audit and export only: MODEL becomes OUT/model.onnx, with its weights."""
    from v4export import api

    start = time.monotonic()
    how = _shared(given) | {"stages": Stages(quiet=quiet), "command": _command()}
    built = api.export(given.pop("model"), given.pop("out"), **how, **given)
    print_result(as_json, built, show.built(built, time.monotonic() - start, _command()))


@cli.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="UTF-8, of the kind the model will see.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File to make, .safetensors.")
@click.option("--method", type=click.Choice(["percentile", "max", "mse"]), default="percentile", show_default=True)
@click.option("--percentile", type=float, default=99.99, show_default=True, help="Of magnitudes, for that method.")
@click.option("--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Of the text to run.")
@click.option("--context", type=click.IntRange(1), help="Tokens of a sequence.  [default: 512 or the model's]")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
@quiet_option
def calibrate(model: str, out: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Run text through MODEL and find the scales by which --precision fp8-w8a8 rounds inputs.

    A run that is stopped goes on where it was when the same command is given again.
    """
    from v4export import api

    found = api.calibrate(model, out, stages=Stages(quiet=quiet), **given)
    print_result(as_json, show.calibration_json(found), show.calibration(found, out))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_engine_options
@click.option(
    "--refit-from",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Of the same graph, built with --refit: give its engine these weights. Takes a GPU.",
)
@json_option
@quiet_option
def engine(bundle: Path, refit_from: Path | None, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Build the TensorRT engine of a BUNDLE that has none, or another one."""
    from v4export import api

    how = replace(_engine(given), refit_from=refit_from)
    engines = api.engine(bundle, how, stages=Stages(quiet=quiet), on_line=_log if verbose else None)
    print_result(as_json, engines, "\n".join(map(show.engine, engines.values())))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where its checkpoint is now, if it has moved.")
@click.option(
    "--decode", type=click.IntRange(0), default=32, show_default=True, help="Tokens to decode after a prompt."
)
@_device
@click.option("--kernels", is_flag=True, help="Check as well what --kernels of run computes.")
@json_option
@quiet_option
def verify(bundle: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Compare a BUNDLE's graph with the PyTorch definition at every layer boundary."""
    from v4export import api
    from v4export.package.bundle import Bundle

    start = time.monotonic()
    precision = Bundle.open(bundle).precision.name
    found = api.verify(bundle, stages=Stages(quiet=quiet), on_boundary=_print_boundary(as_json, precision), **given)
    print_result(as_json, found, show.verdict(found.summary(), time.monotonic() - start, _command()))
    found.check()


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """``fp8,mxfp4``."""
    return None if value is None else [name for name in value.split(",") if name]


@cli.command(name="eval")
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="File of text in UTF-8.")
@click.option("--precision", callback=_names, metavar="NAME,..|all", help="Recipes.  [default: all; a BUNDLE's own]")
@click.option("--keep", multiple=True, metavar="FORMAT:PATTERN", help="Another format for modules, in every recipe.")
@click.option(
    "--state", type=click.Choice([AUTO, FP8]), default=AUTO, show_default=True, help="fp8: E4M3 rows as well."
)
@click.option("--context", type=click.IntRange(1), help="Tokens of a window.  [default: 512 or the model's]")
@click.option("--tokens", type=click.IntRange(1), help="Most tokens of the text to use.  [default: all]")
@click.option("--layers", callback=layers_of, metavar="0:N", help="Only the first layers: their errors, no perplexity.")
@click.option(
    "--calibrate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text, or scales of `v4export calibrate`, for recipes that round inputs.",
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where a BUNDLE's checkpoint is, if it has moved.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to make of tables and charts.")
@_device
@json_option
@quiet_option
def evaluate(model: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure what recipes cost in quality: perplexity, divergence from float32 and errors of layers on a text.

    MODEL is a checkpoint directory, or a bundle, whose graph is then measured beside its recipe. Windows of the text
    are evaluated one by one; every token of a window but the first is predicted.
    """
    from v4export import api

    found = api.evaluate(model, stages=Stages(quiet=quiet), **given)
    print_result(as_json, found, show.evaluation(found))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to go on from.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="The same, from a file.")
@click.option("--chat", is_flag=True, help="The prompt is a question: put it into the chat template.")
@click.option(
    "--messages", type=click.Path(path_type=Path), help="JSON file of a conversation, as OpenAI's API has it."
)
@click.option("--thinking", is_flag=True, help="Of a conversation: let the model reason before it answers.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is all.")
@click.option("--seed", type=int, help="Of the sampling.")
@click.option("--stop", multiple=True, help="Stop before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--skip-decoder", is_flag=True, help="V4.1: only a prompt's last tokens pass all layers; not exact.")
@prompt_cache_options
@click.option("--think", metavar="K|auto|off", help="Steps of a thought before every token, or where unsure.  [auto]")
@click.option("--think-threshold", type=float, help="Of what shows that it is unsure.  [default: the manifest's]")
@click.option(
    "--draft-max", type=click.IntRange(0), metavar="N", help="Tokens drafted ahead of a step; 0 is none.  [default: 1]"
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Of onnxruntime; 0 lets it choose.")
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    default="0",
    show_default=True,
    callback=lambda _, __, v: int(v),
    help="Of int4 and int8 on a CPU: 4 rounds activations to int8, which is faster.",
)
@_device
@executor_options
@click.option("-v", "--verbose", is_flag=True, help="Where it paused to think, and what it thought, on stderr.")
@json_option
def run(bundle: Path, as_json: bool, verbose: bool, **given: Any) -> None:
    """Generate text from a BUNDLE with onnxruntime, or its engines with TensorRT.

    The ranks of a shared model run in this process, or each in its own where torchrun starts them: torchrun --no-python
    --nproc-per-node N v4export run BUNDLE ..; the first of them prints.
    """
    from v4export import api

    prints = os.environ.get("RANK", "0") == "0"
    on_text = None if as_json or not prints else lambda text: click.echo(text, nl=False)
    generation = api.run(bundle, on_text=on_text, **given)
    if not prints:
        return
    if as_json:
        click.echo(json.dumps(generation.as_json()))
    else:
        click.echo()
        click.echo(show.timings(generation), err=True)
    if verbose:
        click.echo(show.pauses(generation), err=True)


@cli.command()
@click.argument("model")
@json_option
def inspect(model: str, as_json: bool) -> None:
    """Say what MODEL, a checkpoint directory or a preset, is: parameters, types, state, what is supported where."""
    from v4export import api

    found = api.inspect(model)
    click.echo(json.dumps(show.inspection_json(found), indent=1) if as_json else show.inspection(found))


@cli.command()
@click.argument("config", metavar="PRESET|CONFIG")
@_out
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dtype", help="Of the unquantised tensors.  [default: the config's]")
@click.option("--draft", is_flag=True, help="A multi-token prediction layer, too.")
@click.option("--sparse", is_flag=True, help="Real sizes, holes for bytes: a terabyte takes no disk.")
@click.option("--fused", is_flag=True, help="Experts stacked as transformers holds them.")
@quiet_option
def synth(config: str, out: Path, quiet: bool, **given: Any) -> None:
    """Write a checkpoint with random weights, as the Hub has them, for a preset or a config.json."""
    from v4export import api

    click.echo(api.synth(config, out, stages=Stages(quiet=quiet), **given))


@cli.command()
@json_option
def presets(as_json: bool) -> None:
    """List the configurations that come with v4export."""
    from v4export import api

    found = {name: api.inspect(name) for name in api.preset_names()}
    rows = {name: show.inspection_json(one) for name, one in found.items()}
    click.echo(json.dumps(rows, indent=1) if as_json else show.preset_table(found))


@cli.command()
@click.option("--ops", is_flag=True, help="What computes each op in an engine, and how plugins get in, with reasons.")
@click.option("--recipes", is_flag=True, help="What --precision and --keep can be, and for which targets.")
@json_option
def doctor(ops: bool, recipes: bool, as_json: bool) -> None:
    """Say which runtimes this machine has, and what each of them will do."""
    from v4export.engine import implementations
    from v4export.engine.doctor import diagnose
    from v4export.engine.targets import support_rows

    asked = {"ops": implementations.rows, "ways": implementations.ways_rows} if ops else {}
    asked |= {"recipes": recipe_rows, "formats": format_rows, "targets": support_rows} if recipes else {}
    if asked:
        tables = {name: rows() for name, rows in asked.items()}
        return print_result(as_json, tables, "\n\n".join(map(show.table, tables.values())))
    findings = diagnose(Path.cwd())
    print_result(as_json, findings, show.findings(findings))


for _command_elsewhere in (cli_bisect.bisect, cli_scale.plan, cli_scale.bench, cli_package.package):
    cli.add_command(_command_elsewhere)


def _print_boundary(as_json: bool, precision: str) -> Callable[[Any], None]:
    from v4export.verify.report import line

    return lambda boundary: None if as_json else click.echo(line(boundary, precision))


def _log(text: str) -> None:
    click.echo(text, err=True)


def _command() -> str:
    """The command that makes the same at one go."""
    return shlex.join(["v4export", *(word for word in sys.argv[1:] if word != "--resume")])
