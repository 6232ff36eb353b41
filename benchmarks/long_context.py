"""What a token costs each kind of layer as its past grows, on a CPU, and how many nodes each kind has.

Layers have DeepSeek-V4-Flash's widths of attention with a quarter of its heads, and experts too small to matter.
Needs a machine that does nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from engines import THREADS, Child, Onnx
from page import PAGE, replace_between, row

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig

BEGIN, END = "<!-- measured: long contexts -->", "<!-- end: long contexts -->"
LAYERS = 4
HELD = (1024, 16384, 65536)
MAX_SEQ_LEN = HELD[-1] + 64
_SMALL = {
    "hidden_size": 1024, "num_layers": LAYERS, "num_heads": 16, "q_lora_rank": 512, "moe_intermediate_size": 32,
    "num_experts": 2, "experts_per_token": 1, "vocab_size": 320, "max_position_embeddings": 1 << 20,
    "dtype": "float32", "num_mtp_layers": 0,
}  # fmt: skip


def full() -> ModelConfig:
    """Latent attention whose cached rows are as wide as DeepSeek-V4's."""
    return replace(
        presets.load("deepseek-v3"), **_SMALL, kv_lora_rank=448, intermediate_size=32, moe_layers=tuple(range(LAYERS)),
        num_groups=1, topk_groups=1, fp8=None,
    )  # fmt: skip


def selected() -> ModelConfig:
    """The same with DeepSeek-V3.2's indexer."""
    return replace(full(), family="deepseek_v32", indexer=presets.load("deepseek-v3.2").indexer)


def compressed(kind: str) -> Callable[[], ModelConfig]:
    """DeepSeek-V4's attention of one kind."""

    def make() -> ModelConfig:
        flash = presets.load("deepseek-v4-flash")
        assert flash.compressed is not None
        ratio = {"window": 0, "csa": 4, "hca": 128}[kind]
        attention = replace(flash.compressed, layers=(kind,) * LAYERS, ratios=(ratio,) * LAYERS, o_groups=4)
        small = {**_SMALL, "moe_layers": tuple(range(LAYERS)), "hash_layers": (), "fp8": None, "fp4_experts": False}
        return replace(flash, **small, compressed=attention)

    return make


KINDS: dict[str, Callable[[], ModelConfig]] = {
    "full attention, latent 448+64": full,
    "the same, 2048 tokens selected (V3.2)": selected,
    "window of 128": compressed("window"),
    "window and 512 selected entries of 4 (CSA)": compressed("csa"),
    "window and all entries of 128 (HCA)": compressed("hca"),
}


@click.command(help=__doc__)
@click.option("--rounds", default=5, show_default=True, help="Rounds of six steps of which the best counts.")
@click.option("--into", type=click.Path(path_type=Path), default=PAGE, help="Page whose measured part is replaced.")
def main(rounds: int, into: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        here, engines, nodes = Path(scratch), {}, {}
        for number, (name, make) in enumerate(KINDS.items()):
            source = synth(make(), here / f"checkpoint-{number}")
            built = api.export(source, here / f"bundle-{number}", precision="fp32", max_seq_len=MAX_SEQ_LEN)
            nodes[name] = max(built.graphs.lint.nodes_per_layer.values())
            engines[name] = Child(name, Onnx, here / f"bundle-{number}", True, MAX_SEQ_LEN)
        times = {name: [_least(engine, held, rounds) for held in HELD] for name, engine in engines.items()}
        for engine in engines.values():
            engine.close()
    header = [f"{held:,} cached" for held in HELD]
    lines = [row("ms a layer: least of its steps", *header, "last / first", "nodes of model.onnx"), row(*["---"] * 6)]
    for name, least in times.items():
        cells = [f"{ms:.2f}" for ms in least]
        lines.append(row(name, *cells, f"{least[-1] / least[0]:.1f}", str(nodes[name])))
    note = f"{THREADS} threads, float32, {LAYERS} layers of 16 heads over hidden states of 1024."
    replace_between(into, BEGIN, END, ["\n".join(lines), note])
    click.echo("\n".join(lines))


def _least(engine: Child, held: int, rounds: int) -> float:
    engine.time(held, 1, 2)
    return float(np.min([engine.time(held, 1, 6) for _ in range(rounds)])) * 1e3 / LAYERS


if __name__ == "__main__":
    main()
