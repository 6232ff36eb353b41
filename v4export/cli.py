"""The command line: one command a verb, which parses, calls one function of ``v4export.api``, and prints its result."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from v4export import show
from v4export.errors import BadInput, NotEnough, NumbersDiffer, V4Error
from v4export.plain import to_json
from v4export.precision import PRECISIONS
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
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt, Interrupted):
        _fail("interrupted; nothing was left behind", 130)
    except MemoryError:
        short = NotEnough("this machine's memory does not suffice", fix="use a machine with more, or --layers 0:N")
        _fail(str(short), short.exit_code)
    sys.exit(0)


def _stop(*_: object) -> NoReturn:
    raise Interrupted


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _explain(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        raise BadInput(_EXPLAINED[param.name or ""])


def _layers(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    """``0:4``, or ``4`` for the same."""
    if value is None:
        return None
    start, _, stop = value.rpartition(":")
    try:
        return range(int(start or 0), int(stop))
    except ValueError:
        raise BadInput(f"--layers {value} is not a range", fix="give --layers 0:4") from None


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
_device = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
_out = click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to make.")

_export_options = _options(
    click.argument("model"),
    _out,
    click.option("--precision", "--dtype", default="bf16", show_default=True, help=" | ".join(PRECISIONS)),
    click.option("--max-seq-len", type=click.IntRange(1), help="Longest sequence.  [default: 4096 or the model's]"),
    click.option("--layers", callback=_layers, metavar="0:N", help="Only the first layers, to try a big model."),
    click.option("--copy-weights", is_flag=True, help="Copy shards into OUT instead of linking them."),
    click.option("--engram-inside", is_flag=True, help="Make Engram tables part of the graph, if they are small."),
    click.option("--think-steps", type=click.IntRange(0), help="Of a thought; 0 leaves reasoning layers out."),
    click.option(
        "--no-scan", "scan_values", flag_value=False, default=True, help="Do not look for NaN in the weights."
    ),
    click.option("--force", is_flag=True, help="Replace OUT if it is a bundle."),
    *(click.option(f"--{n}", n, is_flag=True, callback=_explain, expose_value=False, hidden=True) for n in _EXPLAINED),
    _json,
    _quiet,
)

_engine_options = _options(
    click.option("--target", "targets", multiple=True, help="sm89, rtx4090, ...; repeatable.  [default: all that can]"),
    click.option("--backend", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Which TensorRT."),
    click.option("--max-batch-size", "max_batch", type=click.IntRange(1), default=1, show_default=True),
    click.option(
        "--max-chunk", type=click.IntRange(1), help="New tokens of a prefill step.  [default: 1 GiB of scratch]"
    ),
    click.option("--plugins", help="auto | aot | library | none: how our kernels get in.  [default: auto]"),
    click.option("--workspace-gib", type=float, help="Limit on the builder's scratch memory."),
    click.option(
        "--minShapes", "min_shapes", metavar="NAME:AxB,..", help="As trtexec: shapes of a profile of your own."
    ),
    click.option("--optShapes", "opt_shapes", metavar="NAME:AxB,.."),
    click.option("--maxShapes", "max_shapes", metavar="NAME:AxB,.."),
    click.option("-v", "--verbose", is_flag=True, help="TensorRT's log, too, on stderr."),
)
_ENGINE_NAMES = ("targets", "backend", "max_batch", "max_chunk", "workspace_gib", "plugins")


def _engine(given: dict[str, Any]) -> Any:
    """EngineOptions of the options that are its, taken out of ``given``."""
    from v4export.engine.options import EngineOptions
    from v4export.engine.profiles import ShapeOverride

    texts = [given.pop(f"{kind}_shapes") for kind in ("min", "opt", "max")]
    mine = {name: given.pop(name) for name in _ENGINE_NAMES}
    mine["targets"] = mine["targets"] or None
    return EngineOptions(**mine, shapes=ShapeOverride.parse(*texts) if any(texts) else None)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="v4export")
def cli() -> None:
    """From a DeepSeek-family mixture-of-experts checkpoint to a checked ONNX graph and TensorRT engines."""


@cli.command()
@_export_options
@_engine_options
@click.option("--no-engine", is_flag=True, help="Stop after the graph is verified.")
@click.option("--no-verify", is_flag=True, help="Do not compare the graph with the PyTorch definition.")
@_device
def build(as_json: bool, quiet: bool, verbose: bool, no_engine: bool, no_verify: bool, **given: Any) -> None:
    """Audit, export, verify, build the engine, and write a report: the whole way from MODEL to a bundle.

    MODEL is a Hugging Face checkpoint directory. OUT appears whole, or not at all.
    """
    from v4export import api
    from v4export.engine.options import precision_for

    start, asked = time.monotonic(), _engine(given)
    engine = None if no_engine else asked
    shown = precision_for(engine, given["precision"])[0] if engine else given["precision"]
    try:
        built = api.build(
            given.pop("model"),
            given.pop("out"),
            engine=engine,
            verify=not no_verify,
            stages=Stages(quiet=quiet),
            on_boundary=_print_boundary(as_json, shown),
            on_line=_log if verbose else None,
            command=_command(),
            **given,
        )
    except NumbersDiffer as error:
        _result(as_json, {"verdict": error.summary}, show.verdict(error.summary, time.monotonic() - start, _command()))
        raise
    _result(as_json, built, show.built(built, time.monotonic() - start, _command()))


@cli.command()
@_export_options
def export(as_json: bool, quiet: bool, **given: Any) -> None:
    """Audit and export only: MODEL becomes OUT/model.onnx, with its weights."""
    from v4export import api

    start = time.monotonic()
    built = api.export(given.pop("model"), given.pop("out"), stages=Stages(quiet=quiet), command=_command(), **given)
    _result(as_json, built, show.built(built, time.monotonic() - start, _command()))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@_engine_options
@_json
@_quiet
def engine(bundle: Path, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
    """Build the TensorRT engine of a BUNDLE that has none, or another one."""
    from v4export import api

    engines = api.engine(bundle, _engine(given), stages=Stages(quiet=quiet), on_line=_log if verbose else None)
    _result(as_json, engines, "\n".join(map(show.engine, engines.values())))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Where its checkpoint is now, if it has moved.")
@click.option(
    "--decode", type=click.IntRange(0), default=32, show_default=True, help="Tokens to decode after a prompt."
)
@_device
@_json
@_quiet
def verify(bundle: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Compare a BUNDLE's graph with the PyTorch definition at every layer boundary."""
    from v4export import api
    from v4export.package.bundle import Bundle

    start = time.monotonic()
    precision = Bundle.open(bundle).precision.name
    found = api.verify(bundle, stages=Stages(quiet=quiet), on_boundary=_print_boundary(as_json, precision), **given)
    _result(as_json, found, show.verdict(found.summary(), time.monotonic() - start, _command()))
    found.check()


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to go on from.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="The same, from a file.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is all.")
@click.option("--seed", type=int, help="Of the sampling.")
@click.option("--stop", multiple=True, help="Stop before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end-of-text token.")
@click.option("--skip-decoder", is_flag=True, help="V4.1: only a prompt's last tokens pass all layers; not exact.")
@click.option("--think", metavar="K|auto|off", help="Steps of a thought before every token, or where unsure.  [auto]")
@click.option("--think-threshold", type=float, help="Of what shows that it is unsure.  [default: the manifest's]")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of onnxruntime; 0 lets it choose.")
@_device
@click.option("-v", "--verbose", is_flag=True, help="Where it paused to think, and what it thought, on stderr.")
@_json
def run(bundle: Path, as_json: bool, verbose: bool, **given: Any) -> None:
    """Generate text from a BUNDLE with onnxruntime."""
    from v4export import api

    on_text = None if as_json else lambda text: click.echo(text, nl=False)
    generation = api.run(bundle, on_text=on_text, **given)
    if as_json:
        click.echo(json.dumps(generation.as_json()))
    else:
        click.echo()
        click.echo(show.timings(generation), err=True)
    if verbose:
        click.echo(show.pauses(generation), err=True)


@cli.command()
@click.argument("model")
@_json
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
@click.option("--sparse", is_flag=True, help="Real sizes, holes for bytes: a terabyte takes no disk.")
@click.option("--fused", is_flag=True, help="Experts stacked as transformers holds them.")
@_quiet
def synth(config: str, out: Path, quiet: bool, **given: Any) -> None:
    """Write a checkpoint with random weights, as the Hub has them, for a preset or a config.json."""
    from v4export import api

    click.echo(api.synth(config, out, stages=Stages(quiet=quiet), **given))


@cli.command()
@_json
def presets(as_json: bool) -> None:
    """List the configurations that come with v4export."""
    from v4export import api

    found = {name: api.inspect(name) for name in api.preset_names()}
    rows = {name: show.inspection_json(one) for name, one in found.items()}
    click.echo(json.dumps(rows, indent=1) if as_json else show.preset_table(found))


@cli.command()
@click.option("--ops", is_flag=True, help="What computes each op in an engine, and how plugins get in, with reasons.")
@_json
def doctor(ops: bool, as_json: bool) -> None:
    """Say which runtimes this machine has, and what each of them will do."""
    from v4export.engine import implementations
    from v4export.engine.doctor import diagnose

    if ops:
        tables = implementations.rows(), implementations.ways_rows()
        return _result(as_json, dict(zip(("ops", "ways"), tables, strict=True)), "\n\n".join(map(show.table, tables)))
    findings = diagnose(Path.cwd())
    _result(as_json, findings, show.findings(findings))


def _print_boundary(as_json: bool, precision: str) -> Callable[[Any], None]:
    from v4export.verify.report import line

    return lambda boundary: None if as_json else click.echo(line(boundary, precision))


def _log(text: str) -> None:
    click.echo(text, err=True)


def _result(as_json: bool, value: Any, text: str) -> None:
    click.echo(to_json(value) if as_json else text)


def _command() -> str:
    return shlex.join(["v4export", *sys.argv[1:]])
