"""Correct builds of random shapes, precisions and weights, each verified: does any fail that should not?

``python benchmarks/false_alarms.py --builds 500 --keep FILE`` goes on from what FILE has, and writes the table of
docs/verification.md.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from page import replace_between, row

from v4export import api, presets
from v4export.checkpoint.synth import synth
from v4export.config import ModelConfig
from v4export.errors import BadInput, NotSupported

PAGE = Path(__file__).parent.parent / "docs" / "verification.md"
BEGIN, END = "<!-- measured: false alarms -->", "<!-- end: false alarms -->"
#: Preset -> how often it is drawn: a build of the last three takes ten times as long.
PRESETS = {"tiny-v2-lite": 4, "tiny-v3": 4, "tiny-v3.2": 4, "tiny-v4": 1, "tiny-v4.1": 1, "tiny-v4x": 1}
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "mxfp8", "mxfp4", "nvfp4", "int8", "int4")


def drawn(number: int) -> tuple[str, ModelConfig, str]:
    """The preset, a shape made of it, and a precision."""
    rng = random.Random(number)
    [preset] = rng.choices(list(PRESETS), list(PRESETS.values()))
    precision = rng.choice(PRECISIONS)
    config = presets.load(preset)
    groups, size = (1, rng.randint(4, 16)) if config.num_groups == 1 else (rng.randint(2, 4), rng.randint(2, 5))
    kept = rng.randint(1, groups)
    routed = {
        "num_experts": groups * size,
        "num_groups": groups,
        "topk_groups": kept,
        "experts_per_token": rng.randint(1, min(size * kept, 6)),
        "routed_scaling_factor": rng.choice((1.0, 1.5, 2.5)),
        "moe_intermediate_size": rng.choice((32, 64, 96)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
    }
    kind = _compressed if config.compressed else _latent
    return preset, replace(config, **routed, **kind(config, rng)), precision


def _latent(config: ModelConfig, rng: random.Random) -> Mapping[str, Any]:
    layers = rng.randint(1, 4)
    q_rank = rng.choice((32, 64)) if config.indexer else rng.choice((None, 32, 64))
    found: dict[str, Any] = {
        "hidden_size": rng.choice((64, 96, 128, 160)),
        "num_heads": rng.randint(1, 4),
        "q_lora_rank": q_rank,
        "kv_lora_rank": rng.choice((32, 64)),
        "qk_nope_head_dim": rng.choice((8, 16, 24)),
        "qk_rope_head_dim": rng.choice((4, 8, 16)),
        "v_head_dim": rng.choice((8, 16, 32)),
        "intermediate_size": rng.choice((128, 192, 256)),
        "attention_bias": rng.random() < 0.3,
    }
    if not config.engram:
        found |= {"num_layers": layers, "moe_layers": tuple(range(rng.randint(0, layers), layers))}
    if config.indexer:
        found["indexer"] = replace(config.indexer, top_k=rng.randint(1, 50))
    return found


def _compressed(config: ModelConfig, rng: random.Random) -> Mapping[str, Any]:
    c, indexer = config.compressed, config.indexer
    assert c is not None and indexer is not None and config.hyper is not None
    return {
        "num_heads": rng.choice((2, 4)),
        "q_lora_rank": rng.choice((32, 64)),
        "compressed": replace(
            c, window=rng.randint(4, 40), o_groups=rng.choice((1, 2)), o_lora_rank=rng.choice((8, 16))
        ),
        "indexer": replace(indexer, top_k=rng.randint(1, 30)),
        "hyper": replace(config.hyper, streams=rng.randint(2, 4), sinkhorn_iterations=rng.choice((1, 3, 20))),
    }


def built(number: int) -> dict[str, Any]:
    """What became of one."""
    preset, config, precision = drawn(number)
    found: dict[str, Any] = {"number": number, "preset": preset, "precision": precision}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            hub = synth(config, Path(scratch) / "hub", seed=number)
            out = Path(scratch) / "out"
            verification = api.build(hub, out, precision=precision, engine=None, max_seq_len=512).verification
        except (BadInput, NotSupported) as refused:
            return found | {"verdict": "REFUSED", "said": str(refused)}
    assert verification is not None
    limited = [b for b in verification.boundaries if b.limit > 0]
    wrong = [f"{b.name}: {note}" for b in verification.boundaries for note in b.notes]
    verdict = "FAIL" if not verification.passed else "AMBIGUOUS" if any(b.ties for b in limited) else "PASS"
    return found | {
        "verdict": verdict,
        "boundaries": len(limited),
        "worst": max(b.rel / b.limit for b in limited),
        "mean": max((b.mean / b.mean_limit for b in limited if b.mean_limit), default=0.0),
        "wrong": wrong,
        "seconds": time.perf_counter() - start,
    }


def table(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A row for each preset: builds by verdict, and how near the nearest came to its limits."""
    run = [one for one in found if one["verdict"] != "REFUSED"]
    lines = [
        row("model", "builds", "PASS", "AMBIGUOUS", "FAIL", "boundaries", "worst error / limit", "worst mean / limit")
    ]
    lines.append(row(*["---"] * 8))
    for name, some in [(p, [one for one in run if one["preset"] == p]) for p in PRESETS] + [("**all**", run)]:
        if some:
            counts = [sum(one["verdict"] == verdict for one in some) for verdict in ("PASS", "AMBIGUOUS", "FAIL")]
            worst = [f"{max(one[which] for one in some):.2f}" for which in ("worst", "mean")]
            lines.append(row(name, *map(str, (len(some), *counts, sum(one["boundaries"] for one in some))), *worst))
    return lines


@click.command(help=__doc__)
@click.option("--builds", default=500, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), required=True)
def main(builds: int, keep: Path) -> None:
    found = [json.loads(line) for line in keep.read_text().splitlines()] if keep.exists() else []
    number = len(found)
    while sum(one["verdict"] != "REFUSED" for one in found) < builds:
        found.append(built(number))
        with keep.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        click.echo(f"{number} {found[-1]}", err=True)
        number += 1
        write(found)


def write(found: list[dict[str, Any]]) -> None:
    """The page's part."""
    failed = [
        f"* {one['preset']} {one['precision']}, number {one['number']}: {one['wrong']}"
        for one in found
        if one["verdict"] == "FAIL"
    ]
    refused = sum(one["verdict"] == "REFUSED" for one in found)
    replace_between(PAGE, BEGIN, END, ["\n".join(table(found)), f"{refused} draws were refused by the build.", *failed])


if __name__ == "__main__":
    main()
