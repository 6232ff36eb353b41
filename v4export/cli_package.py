"""Packages of a bundle for servers, and for programs that are not Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4export.cli_options import executor_options, json_option, out_folder, print_result
from v4export.errors import BadInput
from v4export.serve.limits import Limits

if TYPE_CHECKING:
    from v4export.cpp.verb import CppPackage
    from v4export.serve.repository import Packaged


@click.command()
@click.argument("bundle", type=out_folder)
@click.option(
    "--triton", type=out_folder, metavar="DIR", help="Model repository for Triton to make: text in, text out."
)
@click.option("--cpp", type=out_folder, metavar="DIR", help="CMake project of a C++ runner to make: ids in, ids out.")
@click.option("--name", help="Of Triton's model.  [default: the bundle's]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of the server.")
@executor_options
@click.option("--slots", type=click.IntRange(1), default=Limits.slots, show_default=True, help="Sequences at a time.")
@click.option("--queue", type=click.IntRange(1), default=Limits.queue, show_default=True, help="Requests that wait.")
@click.option(
    "--chunk",
    type=click.IntRange(1),
    default=Limits.chunk,
    show_default=True,
    help="Most prompt tokens read between two tokens of the others.",
)
@click.option(
    "--draft-max",
    type=click.IntRange(0),
    metavar="N",
    help="Most tokens drafted ahead of a step; 0 is none.  [default: 1]",
)
@click.option(
    "-n",
    "--max-new-tokens",
    "max_tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Where a client names no number.",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Of onnxruntime; 0 lets it choose.")
@json_option
def package(bundle: Path, triton: Path | None, cpp: Path | None, as_json: bool, **given: Any) -> None:
    """Write what others need to serve or run a BUNDLE: a model repository for Triton, or a C++ project.

    A server needs v4export in its Python. If the bundle has an engine of TensorRT, it becomes a model of its own, for
    callers with a token loop of their own. A C++ runner needs no Python; the bundle stays where it is. Options but
    the first two are the server's.
    """
    from v4export import api

    if (triton is None) == (cpp is None):
        raise BadInput("one thing is packaged at a time", fix="give --triton DIR or --cpp DIR")
    if triton is not None:
        served = api.package(bundle, triton, **given)
        print_result(as_json, served, _triton(served))
    else:
        assert cpp is not None
        made = api.package_cpp(bundle, cpp)
        print_result(as_json, made, _cpp(made))


def _triton(made: Packaged) -> str:
    chat = "text_input or messages" if made.chat else "text_input; there is no chat template"
    engine = [f"no model of an engine: {made.no_engine}"] if made.no_engine else []
    return "\n".join([f"{made.folder}: {', '.join(made.models)}", f"takes {chat}", *engine])


def _cpp(made: CppPackage) -> str:
    lines = [f"{made.folder}: {len(made.files)} files, a CMake project that runs {made.bundle}"]
    if made.thoughts:
        lines.append("thoughts are left out: its tokens are those of v4export run --think off")
    build = made.folder / "build"
    lines.append(f"cmake -S {made.folder} -B {build} && cmake --build {build}")
    return "\n".join([*lines, f"{build / 'v4export_run'} {made.bundle} --ids 1,2,3"])
