"""Layers of DeepSeek-V4-Flash at their real widths, one of each kind, with 32 of their 256 experts in stored FP4.

Exports, verifies and builds an engine, and says what each cost. Needs 10 GB of disk and 24 GB of memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click

from v4export import presets
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig

EXPERTS = 32


def layers() -> ModelConfig:
    """A window layer that routes by hash, a CSA layer and an HCA layer."""
    flash = presets.load("deepseek-v4-flash")
    assert flash.compressed is not None
    return replace(
        flash, num_layers=3, moe_layers=(0, 1, 2), hash_layers=(0,), num_experts=EXPERTS, num_mtp_layers=0,
        compressed=replace(flash.compressed, layers=("window", "csa", "hca"), ratios=(0, 4, 128)),
    )  # fmt: skip


@click.command(help=__doc__)
@click.option("--folder", type=click.Path(path_type=Path), help="Keep the checkpoint here between runs.")
@click.option("--precision", default="mxfp4", show_default=True)
@click.option("--target", default="sm120", show_default=True)
@click.option("--verify/--no-verify", default=True, show_default=True)
def main(folder: Path | None, precision: str, target: str, verify: bool) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = (folder or Path(scratch)) / "flash-3-layers"
        if not source.exists():
            synth(layers(), source)
        out = Path(scratch) / "out"
        program = Path(sys.executable).with_name("v4export")
        command = [str(program), "build", str(source), "-o", str(out), "--precision", precision]
        command += ["--target", target, "--max-seq-len", "1024", *([] if verify else ["--no-verify"])]
        start = time.perf_counter()
        done = subprocess.run(command, check=False)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        click.echo(f"exit {done.returncode}, {time.perf_counter() - start:.0f} s, peak {peak:.1f} GB")
        manifest = next((f for f in (out, out.with_name("out.failed")) if f.exists()), None)
        if manifest:
            facts = json.loads((manifest / "v4export.json").read_text())
            click.echo(
                json.dumps({key: facts[key] for key in ("stages", "graphs", "engine") if key in facts}, indent=1)
            )


if __name__ == "__main__":
    main()
