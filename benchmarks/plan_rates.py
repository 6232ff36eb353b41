"""Rates that `v4export plan` reckons by, measured on this machine: conversions of weights, the scan for NaN, repacking.

Prints a line each; the table of rates in v4export/plan/rates.py is written by hand from it. Needs 1 GB of disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.scan import not_finite
from v4export.checkpoint.tensor import read_header
from v4export.graphs.repacked import linear
from v4export.graphs.shards import Conversion, write
from v4export.graphs.weights import decide
from v4export.precision import FORMATS, Precision

ROWS, COLUMNS = 4096, 4096


@click.command(help=__doc__)
@click.option("--matrices", default=2, show_default=True, help="Of 16.8 million numbers each, for every format.")
def main(matrices: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        file = here / "source.safetensors"
        draw = np.random.default_rng(0)
        values = {
            f"m{i}.weight": draw.standard_normal((ROWS, COLUMNS), np.float32).astype(ml_dtypes.bfloat16)
            for i in range(matrices)
        }
        save_file(values, file)
        tensors = read_header(file)[1]
        weights = [Weight(name, (ROWS, COLUMNS), "linear", tensor) for name, tensor in tensors.items()]
        numbers = ROWS * COLUMNS * matrices
        seconds = timed(lambda: not_finite(iter(tensors.values()), None))
        click.echo(f"scan                 {sum(t.nbytes for t in tensors.values()) / seconds / 1e6:8.0f} MB/s")
        for format in FORMATS.values():
            recipe = Precision("x", "bfloat16" if format.scaled else format.dtype, format, format)
            made = [one for weight in weights for one in decide(weight, recipe)[1]]
            seconds = timed(lambda made=made: write(made, here, "made", lambda _: None))
            click.echo(f"to {format.name:<17} {numbers / seconds / 1e6:8.1f} million numbers/s")
        for bits in (4, 8):
            stored = np.zeros(ROWS * COLUMNS * bits // 8, np.uint8)
            packed = linear("m", bits, ROWS, COLUMNS)[0]
            one = Conversion(packed.name, packed.dtype, packed.shape, lambda p=packed, s=stored: p.rows(lambda _: s))
            seconds = timed(lambda one=one: write([one] * 4, here, "packed", lambda _: None))
            click.echo(f"repack {bits} bits        {4 * one.nbytes / seconds / 1e6:8.0f} MB/s")
        scale = np.zeros((ROWS, COLUMNS // 32), ml_dtypes.float8_e8m0fnu)
        one = Conversion("s", "bfloat16", scale.shape, lambda: iter([scale.astype(ml_dtypes.bfloat16)]))
        seconds = timed(lambda: write([one] * 40, here, "scales", lambda _: None))
        click.echo(f"multipliers anew     {40 * one.nbytes / seconds / 1e6:8.0f} MB/s")


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
