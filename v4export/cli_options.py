"""Options that several commands have, and how commands print their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from v4export.config.chosen import AUTO, FP8
from v4export.errors import BadInput
from v4export.plain import to_json
from v4export.precision import NATIVE, PRECISIONS


def layers_of(ctx: click.Context, param: click.Parameter, value: str | None) -> range | None:
    """``0:4``, or ``4`` for the same."""
    if value is None:
        return None
    start, _, stop = value.rpartition(":")
    try:
        return range(int(start or 0), int(stop))
    except ValueError:
        raise BadInput(f"--layers {value} is not a range", fix="give --layers 0:4") from None


def options(*several: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(several):
            command = option(command)
        return command

    return add


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")

#: What is made of a model: the recipe, sizes, and what is changed of it.
model_options = options(
    click.option("--precision", "--dtype", default="bf16", show_default=True, help=" | ".join((*PRECISIONS, NATIVE))),
    click.option(
        "--keep", multiple=True, metavar="FORMAT:PATTERN", help="Another format for modules: 'bf16:*.o_proj|lm_head'."
    ),
    click.option("--max-seq-len", type=click.IntRange(1), help="Longest sequence.  [default: 4096 or the model's]"),
    click.option("--layers", callback=layers_of, metavar="0:N", help="Only the first layers, to try a big model."),
    click.option("--copy-weights", is_flag=True, help="Copy shards into OUT instead of linking them."),
    click.option(
        "--cpu-weights/--no-cpu-weights",
        default=True,
        show_default=True,
        help="Write int4 and int8 matrices once more, as onnxruntime's kernels read them.",
    ),
    click.option("--engram-inside", is_flag=True, help="Make Engram tables part of the graph, if they are small."),
    click.option("--think-steps", type=click.IntRange(0), help="Of a thought; 0 leaves reasoning layers out."),
    click.option("--draft", is_flag=True, help="Export the first multi-token prediction layer, to draft tokens with."),
    click.option(
        "--state",
        "--kv-cache-dtype",
        "state",
        type=click.Choice([AUTO, FP8]),
        default=AUTO,
        show_default=True,
        help="Cached rows: as activations are, or E4M3 with multipliers.",
    ),
)

target_option = click.option(
    "--target", "targets", multiple=True, help="sm89, rtx4090, ...; repeatable.  [default: all that can]"
)
batch_option = click.option("--max-batch-size", "max_batch", type=click.IntRange(1), default=1, show_default=True)

#: How a model is spread over devices.
sharding_options = options(
    *(
        click.option(
            f"--{name}", f"--{name}-size", *more, name, type=click.IntRange(1), default=1, show_default=True, help=what
        )
        for name, more, what in (
            ("tp", ["--tensor-parallel-size"], "Ranks that share attention's heads; --ep has to divide it."),
            ("ep", [], "Ranks, or groups of them, that share the experts; alone, attention is whole in each."),
            ("pp", ["--pipeline-parallel-size"], "Stages that share the layers, of max(tp, ep) ranks each."),
        )
    )
)

#: Where a prompt's state is kept.
prompt_cache_options = options(
    click.option(
        "--prompt-cache",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Take the prompt's state from this file as far as it goes, and keep it there.",
    ),
    click.option("--prompt-cache-all", is_flag=True, help="Keep what is generated there, too."),
    click.option("--prompt-cache-ro", is_flag=True, help="Only take from it."),
)

#: What runs a bundle.
executor_options = options(
    click.option(
        "--executor",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="tensorrt runs the bundle's engines, on a GPU.",
    ),
    click.option(
        "--cuda-graphs/--no-cuda-graphs",
        default=True,
        show_default=True,
        help="Of tensorrt: launch all of a decode step at once.",
    ),
    click.option(
        "--kernels/--no-kernels",
        default=False,
        show_default=True,
        help="Of onnxruntime on a CPU: this project's own, compiled when first needed by the system's C++ compiler.",
    ),
    click.option(
        "--no-check",
        "check_files",
        flag_value=False,
        default=True,
        help="Do not compare files with the manifest's hashes before they are used.",
    ),
)

out_folder = click.Path(path_type=Path)


def refuse_beside(ctx: click.Context, allowed: tuple[str, ...], what: str, fix: str) -> None:
    """Raise BadInput where an option is given, on the command line, that is none of the allowed."""
    given = [
        max(param.opts, key=len)
        for param in ctx.command.params
        if param.name not in allowed
        and ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise BadInput(what, f"given: {', '.join(given)}", fix)


def print_result(as_json: bool, value: Any, text: str) -> None:
    """The result on stdout, for programs or for people."""
    click.echo(to_json(value) if as_json else text)
