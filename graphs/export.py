"""From an audited checkpoint to the graphs on disk: trace, place weights, stamp, lint, lower."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from v4export.checkpoint.audit import Audit, Weight
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import ModelConfig
from v4export.engram.files import write as write_engram
from v4export.graphs.lint import Lint, experts_referenced, lint, lint_nodes
from v4export.graphs.lower import lower_for_cpu
from v4export.graphs.ranks import Plan, describe, pieces, rank_graph, stamp_ranks
from v4export.graphs.read_back import check_formats
from v4export.graphs.repacked import Repacking
from v4export.graphs.roundings import check_roundings
from v4export.graphs.stamp import stamp, stamp_drafting, stamp_remembering, stamp_thinking
from v4export.graphs.trace import DRAFT_BLOCK, ENTRIES, THINK, THINK_MIX, THINK_STEP
from v4export.graphs.tracing import traced
from v4export.graphs.types import without_types
from v4export.graphs.variants import roles
from v4export.graphs.weights import Placement, place
from v4export.precision import Precision
from v4export.progress import Stages
from v4export.units import At, Units

PORTABLE = "model.onnx"
#: The same of a model with a decoder, for tokens that do not pass it.
REMEMBERING = "remember.onnx"
#: Of a model that thinks: a whole thought; one step of one, for a caller that loops; and what a thought comes to.
THINKING, THINKING_STEP, THINKING_MIX = "think.onnx", "think_step.onnx", "think_mix.onnx"

#: Of a model that drafts: its first multi-token prediction layer.
DRAFTING = "draft.onnx"


def for_cpu(graph: str) -> str:
    """Name of onnxruntime's copy of a portable graph."""
    return graph.removesuffix(".onnx") + ".cpu.onnx"


def for_engine(graph: str) -> str:
    """Name of TensorRT's copy of a portable graph, where it needs one."""
    return graph.removesuffix(".onnx") + ".tensorrt.onnx"


LOWERED_FOR_CPU = for_cpu(PORTABLE)

#: Weights of a graph that takes hundreds of megabytes of objects that refer to each other, of which none is kept that
#: need not be.
_MANY = 10_000

Stamp = Callable[..., ir.Model]
#: Every portable graph that there may be: the part without which there is none, and what makes it.
STAMPS: dict[str, tuple[str, Stamp]] = {
    PORTABLE: ("embed", stamp),
    REMEMBERING: (ENTRIES, stamp_remembering),
    THINKING: (THINK, partial(stamp_thinking, part=THINK)),
    THINKING_STEP: (THINK_STEP, partial(stamp_thinking, part=THINK_STEP)),
    THINKING_MIX: (THINK_MIX, partial(stamp_thinking, part=THINK_MIX)),
    DRAFTING: (DRAFT_BLOCK, stamp_drafting),
}


def graphs_in(folder: Path) -> list[str]:
    """Names of the portable graphs of a bundle."""
    ranks = takewhile(lambda name: (folder / name).exists(), (rank_graph(PORTABLE, rank) for rank in count()))
    return [*(name for name in STAMPS if (folder / name).exists()), *ranks]


def engine_precisions(folder: Path, config: ModelConfig, precision: Precision) -> dict[str, Precision]:
    """The graphs of a bundle that engines are built of, and the recipe of each: what it has of the bundle's.

    TensorRT-RTX 1.7 joins gate and up projections and fails where they are narrow blocks that several steps of a
    thought share; with those, thoughts are looped.
    """
    found = {}
    for name in graphs_in(folder):
        held = {t.name for t in onnx.load(folder / name, load_external_data=False).graph.initializer}
        found[name] = precision.used({weight: role for weight, role in roles(config).items() if weight in held})
    if THINKING in found and found[THINKING].linear.scaled:
        del found[THINKING]
    return found


@dataclass(frozen=True)
class Graphs:
    """What an export left in its folder.

    Attributes:
        lint: what was proved about the portable graph, or about those of all ranks.
        nodes: of the portable graph, or the first rank's.
        cpu_nodes: of onnxruntime's copy.
        linked: shards shared with the checkpoint.
        pointed_bytes: weight bytes used where they lie.
        written_bytes: weight bytes converted and written.
        beside_bytes: bytes of tables that are read beside the graph, where they lie.
        cpu_bytes: weight bytes written once more, as onnxruntime's kernels for integer matrices read them.
        files: names of the portable graphs and of their copies for onnxruntime.
        ranks: of a model shared among ranks, what each of them holds and reads.
    """

    lint: Lint
    nodes: int
    cpu_nodes: int
    linked: tuple[str, ...]
    pointed_bytes: int
    written_bytes: int
    beside_bytes: int = 0
    cpu_bytes: int = 0
    files: tuple[str, ...] = (PORTABLE, LOWERED_FOR_CPU)
    ranks: tuple[dict[str, Any], ...] = ()


def export_graphs(
    config: ModelConfig,
    audit: Audit,
    precision: Precision,
    out: Path,
    stages: Stages,
    *,
    token_map: np.ndarray | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
    copy_weights: bool = False,
    cpu_weights: bool = True,
    plan: Plan | None = None,
    units: Units | None = None,
) -> Graphs:
    """Write ``model.onnx``, ``model.cpu.onnx`` and ``weights/`` into ``out``; with Engram, what its look-up needs.

    Args:
        config: the model.
        audit: where its weights are.
        precision: of the graph.
        out: the folder.
        stages: shows progress.
        token_map: token id -> compressed id, of a model with Engram.
        scales: by which inputs are rounded, as the recipe wants them.
        copy_weights: copy shards instead of linking them.
        cpu_weights: write integer matrices once more, as onnxruntime's kernels for a CPU read them.
        plan: share the model among ranks so.
        units: what is finished of the build.

    Raises:
        NotSupported: the graph would be refused, or computed wrongly, by a runtime.
    """
    units = units or Units(out)
    with stages.stage("trace") as advance:
        parts = traced(config.of_a_rank(plan.sharding) if plan else config, precision)
        gc.collect()  # what a trace leaves behind is cycles, some hundred megabytes of them
        advance(1)
    tables = {} if config.engram is None or config.engram.inside else engram_tables(audit.weights)
    beside = {t.name: t for stored in tables.values() for t in stored if t}
    weights = [w for w in audit.weights.values() if w.data.name not in beside]
    weights, of_ranks = pieces(weights, plan) if plan else (weights, [])
    with stages.stage("weights", sum(w.data.nbytes for w in weights)) as advance:
        how = {"beside": beside, "scales": scales, "copy": copy_weights, "advance": advance, "units": units}
        placement = place(weights, precision, out, **how)
    if config.engram:
        assert token_map is not None
        lie = placement.beside
        found = {layer: (lie[data.name], lie[scale.name] if scale else None) for layer, (data, scale) in tables.items()}
        write_engram(out, config.engram, token_map, found)
    depends = [config, precision, placement.digest, placement.beside, placement.linked, units.hashes, cpu_weights, plan]

    def made(at: At) -> Graphs:
        how = (config, precision, parts, placement.tensors, out)
        if plan:
            ranks, proved = stamp_ranks(*how, plan, of_ranks)
            graphs = {rank_graph(PORTABLE, number): graph for number, graph in enumerate(ranks)}
            described = describe(graphs, plan)
            return _written(graphs, proved, placement, out, stages, None, units, at, described)
        graphs = {name: make(*how) for name, (part, make) in STAMPS.items() if part in parts}
        proved = lint(graphs[PORTABLE], config, precision, parts)
        for name in graphs.keys() - {PORTABLE}:
            lint_nodes(graphs[name])
            experts_referenced(graphs[name], lambda _: range(config.num_experts))
            check_formats(graphs[name], config, precision)
            check_roundings(graphs[name], config, precision)
        return _written(graphs, proved, placement, out, stages, Repacking() if cpu_weights else None, units, at)

    return units.once("graphs", depends, Graphs, made)


def _written(
    graphs: dict[str, ir.Model],
    proved: Lint,
    placement: Placement,
    out: Path,
    stages: Stages,
    repacking: Repacking | None,
    units: Units,
    at: At,
    ranks: tuple[dict[str, Any], ...] = (),
) -> Graphs:
    """Write every graph, of which ``graphs`` has none left then, and its copy for onnxruntime."""
    names, nodes = list(graphs), [len(graph.graph) for graph in graphs.values()]
    for_cpus: dict[str, int] = {}
    waiting: dict[str, ir.Model] = {}
    with stages.stage("graph", 2 * len(names)) as advance:
        for name in names:
            large = len(graphs[name].graph.initializers) > _MANY
            ir.save(graphs.pop(name), at(name))
            if large:
                gc.collect()
            advance(1)
            lowered = lower_for_cpu(at(name), repacking, out)
            for_cpus[name] = len(lowered.graph)
            if not ranks:  # which are cut where they sum, at values of which types are wanted
                without_types(lowered)
            if repacking and repacking.nbytes:
                waiting[name] = lowered
            else:
                ir.save(lowered, at(for_cpu(name)))
            del lowered
            advance(1)
    cpu_bytes = repacking.nbytes if repacking else 0
    if repacking and waiting:
        with stages.stage("weights for a CPU", cpu_bytes) as advance:
            repacking.write(out, advance, units)
    for name, copy in waiting.items():
        ir.save(copy, at(for_cpu(name)))
    return Graphs(
        proved,
        nodes[0],
        for_cpus[names[0]],
        placement.linked,
        placement.pointed_bytes,
        placement.written_bytes,
        sum(t.nbytes for t in placement.beside.values()),
        cpu_bytes,
        tuple(file for name in names for file in (name, for_cpu(name))),
        ranks,
    )


def engram_tables(weights: Mapping[str, Weight]) -> dict[int, tuple[StoredTensor, StoredTensor | None]]:
    """Layer -> its Engram table and the multipliers of its rows, if they have any."""
    tables = [w for w in weights.values() if w.role == "engram_table"]
    return {int(w.name.split(".")[2]): (w.data, w.scale) for w in tables}
