"""The command that finds the node at which two executions part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from v4export.cli_options import json_option, out_folder, print_result, quiet_option
from v4export.errors import BadInput
from v4export.progress import Stages


@click.command()
@click.argument("subject", type=out_folder, required=False)
@click.option("--against", type=out_folder, metavar="OTHER", help="The reference: a bundle, or an ONNX file.")
@click.option("--engine", is_flag=True, help="Compare TensorRT, on this machine's GPU, with onnxruntime.")
@click.option("--checkpoint", type=out_folder, help="Where a bundle's checkpoint is now, if it has moved.")
@click.option("--prompt", help="Text to run.  [default: text that is built in]")
@click.option("--inputs", type=out_folder, metavar="FILE.npz", help="Of ONNX files: their inputs by name.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is random.")
@click.option("-o", "--out", type=out_folder, metavar="DIR", help="Folder to make of the smallest case.")
@click.option("--replay", type=out_folder, metavar="DIR", help="Run a case again, in place of finding one.")
@json_option
@quiet_option
def bisect(subject: Path | None, replay: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Find the first layer, then the first node, at which two executions part.

    SUBJECT is a bundle, which is compared with the PyTorch definition of its checkpoint or with another bundle, or an
    ONNX file, which is compared with another one. With --engine, one graph is run by two runtimes. Exit code 1 if a
    difference beyond limits was found.
    """
    from v4export import api

    if (subject is None) == (replay is None):
        raise BadInput("one thing is done at a time", fix="give a bundle or an ONNX file, or --replay DIR")
    how = {"stages": Stages(quiet=quiet), **given}
    found: Any = api.replay(replay) if replay else api.bisect(subject or "", **how)
    print_result(as_json, found, found.text())
    found.check()
