"""From an audited checkpoint to the graphs on disk: trace, place weights, stamp, lint, lower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from v4export.checkpoint.audit import Audit, Weight
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import ModelConfig
from v4export.engram.files import write as write_engram
from v4export.graphs.lint import Lint, lint, lint_nodes
from v4export.graphs.lower import lower_for_cpu
from v4export.graphs.stamp import stamp, stamp_remembering, stamp_thinking
from v4export.graphs.trace import ENTRIES, THINK, THINK_MIX, THINK_STEP, trace_parts
from v4export.graphs.weights import place
from v4export.precision import Precision
from v4export.progress import Stages

PORTABLE = "model.onnx"
#: The same of a model with a decoder, for tokens that do not pass it.
REMEMBERING = "remember.onnx"
#: Of a model that thinks: a whole thought; one step of one, for a caller that loops; and what a thought comes to.
THINKING, THINKING_STEP, THINKING_MIX = "think.onnx", "think_step.onnx", "think_mix.onnx"


def for_cpu(graph: str) -> str:
    """Name of onnxruntime's copy of a portable graph."""
    return graph.removesuffix(".onnx") + ".cpu.onnx"


def for_plugins(graph: str) -> str:
    """Name of the copy whose ops are launches of kernels, for TensorRT."""
    return graph.removesuffix(".onnx") + ".plugins.onnx"


LOWERED_FOR_CPU = for_cpu(PORTABLE)

Stamp = Callable[..., ir.Model]
#: Every portable graph that there may be: the part without which there is none, and what makes it.
STAMPS: dict[str, tuple[str, Stamp]] = {
    PORTABLE: ("embed", stamp),
    REMEMBERING: (ENTRIES, stamp_remembering),
    THINKING: (THINK, partial(stamp_thinking, part=THINK)),
    THINKING_STEP: (THINK_STEP, partial(stamp_thinking, part=THINK_STEP)),
    THINKING_MIX: (THINK_MIX, partial(stamp_thinking, part=THINK_MIX)),
}


def graphs_in(folder: Path) -> list[str]:
    """Names of the portable graphs of a bundle."""
    return [name for name in STAMPS if (folder / name).exists()]


def engine_precisions(folder: Path, precision: Precision) -> dict[str, str]:
    """The graphs of a bundle that engines are built of, and the precision of each.

    TensorRT-RTX 1.7 joins gate and up projections and fails where they are FP8 blocks that several steps of a thought
    share; with those, thoughts are looped. What a thought comes to is computed by matrices that are never quantised.
    """
    apart: dict[str, str | None] = {THINKING_MIX: precision.unquantised}
    if precision.fp8:
        apart |= {THINKING: None, THINKING_STEP: "fp8"}  # no experts think, so nothing is FP4
    found = {name: apart.get(name, precision.name) for name in graphs_in(folder)}
    return {name: one for name, one in found.items() if one}


@dataclass(frozen=True)
class Graphs:
    """What an export left in its folder.

    Attributes:
        lint: what was proved about the portable graph.
        nodes: of the portable graph.
        cpu_nodes: of onnxruntime's copy.
        linked: shards shared with the checkpoint.
        pointed_bytes: weight bytes used where they lie.
        written_bytes: weight bytes converted and written.
        beside_bytes: bytes of tables that are read beside the graph, where they lie.
        files: names of the portable graphs and of their copies for onnxruntime.
    """

    lint: Lint
    nodes: int
    cpu_nodes: int
    linked: tuple[str, ...]
    pointed_bytes: int
    written_bytes: int
    beside_bytes: int = 0
    files: tuple[str, ...] = (PORTABLE, LOWERED_FOR_CPU)


def export_graphs(
    config: ModelConfig,
    audit: Audit,
    precision: Precision,
    out: Path,
    stages: Stages,
    *,
    token_map: np.ndarray | None = None,
    copy_weights: bool = False,
) -> Graphs:
    """Write ``model.onnx``, ``model.cpu.onnx`` and ``weights/`` into ``out``; with Engram, what its look-up needs.

    Args:
        config: the model.
        audit: where its weights are.
        precision: of the graph.
        out: the folder.
        stages: shows progress.
        token_map: token id -> compressed id, of a model with Engram.
        copy_weights: copy shards instead of linking them.

    Raises:
        NotSupported: the graph would be refused, or computed wrongly, by a runtime.
    """
    with stages.stage("trace") as advance:
        parts = trace_parts(config, precision)
        advance(1)
    tables = {} if config.engram is None or config.engram.inside else engram_tables(audit.weights)
    beside = {t.name: t for stored in tables.values() for t in stored if t}
    weights = [w for w in audit.weights.values() if w.data.name not in beside]
    with stages.stage("weights", sum(w.data.nbytes for w in weights)) as advance:
        placement = place(weights, precision, out, beside=beside, copy=copy_weights, advance=advance)
    if config.engram:
        assert token_map is not None
        lie = placement.beside
        found = {layer: (lie[data.name], lie[scale.name] if scale else None) for layer, (data, scale) in tables.items()}
        write_engram(out, config.engram, token_map, found)
    made = (config, precision, parts, placement.tensors, out)
    graphs = {name: make(*made) for name, (part, make) in STAMPS.items() if part in parts}
    proved = lint(graphs[PORTABLE], config, parts)
    for name in graphs.keys() - {PORTABLE}:
        lint_nodes(graphs[name])
    counts = {}
    with stages.stage("graph", 2 * len(graphs)) as advance:
        for name, graph in graphs.items():
            ir.save(graph, out / name)
            advance(1)
            lowered = lower_for_cpu(out / name)
            ir.save(lowered, out / for_cpu(name))
            counts[name] = len(lowered.graph)
            advance(1)
    return Graphs(
        proved,
        len(graphs[PORTABLE].graph),
        counts[PORTABLE],
        placement.linked,
        placement.pointed_bytes,
        placement.written_bytes,
        sum(t.nbytes for t in beside.values()),
        tuple(file for name in graphs for file in (name, for_cpu(name))),
    )


def engram_tables(weights: Mapping[str, Weight]) -> dict[int, tuple[StoredTensor, StoredTensor | None]]:
    """Layer -> its Engram table and the multipliers of its rows, if they have any."""
    tables = [w for w in weights.values() if w.role == "engram_table"]
    return {int(w.name.split(".")[2]): (w.data, w.scale) for w in tables}
