"""From a checkpoint to a bundle: the build that ``v4export build`` and ``export`` run, and another engine for one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from v4export.asked import Asked, Source
from v4export.calibrate import verb as calibration
from v4export.checkpoint.activation_scales import FILE as SCALES
from v4export.checkpoint.activation_scales import wanted_scales
from v4export.checkpoint.audit import Audit
from v4export.checkpoint.identity import identity
from v4export.config import ModelConfig
from v4export.config.chosen import AUTO, FP8, Chosen
from v4export.config.sharding import WHOLE, Sharding
from v4export.engine.backend import cuda_devices
from v4export.engine.build import EngineReport
from v4export.engine.implementations import PLUGIN, implementation
from v4export.engine.options import (
    DEFAULT_ENGINE,
    ENGINE_SUFFIX,
    EngineOptions,
    check_targets,
    engine_of,
    plugin_plan,
    precision_for,
    prefill_chunk,
)
from v4export.errors import NotSupported
from v4export.graphs.export import THINKING, Graphs, engine_precisions, export_graphs, for_engine
from v4export.graphs.lower import lower_for_engine
from v4export.graphs.ranks import Plan
from v4export.graphs.shards import Conversion, Placed
from v4export.graphs.shards import write as write_weights
from v4export.graphs.variants import roles
from v4export.opened import account_of, first_layers, longest, open_checkpoint, read_expert_load, token_map_of
from v4export.package.bundle import WRITTEN, Bundle, code_hash, file_facts, versions, write_manifest
from v4export.package.whole import whole_folder
from v4export.plain import to_json
from v4export.plan.foreseen import compared, foresee
from v4export.precision import NATIVE, Precision, native
from v4export.precision import precision as find_precision
from v4export.progress import Stages, collected_seldom
from v4export.runtime.tokenizer import TOKENIZER_FILES
from v4export.units import At, Units
from v4export.verify.boundary import Boundary
from v4export.verify.compare import expected_boundaries
from v4export.verify.report import write_report
from v4export.verify.verification import Verification, verify_bundle


@dataclass(frozen=True)
class Built:
    """What a build left behind.

    Attributes:
        bundle: the folder.
        audit: how the checkpoint's tensors were accounted for.
        graphs: what was exported.
        notes: what is not as it was asked for, and why.
        verification: how the graph compares with the PyTorch definition, if it was verified.
        engines: what TensorRT built of each graph, by the graph's name, if it was asked to.
    """

    bundle: Bundle
    audit: str
    graphs: Graphs
    notes: tuple[str, ...] = ()
    verification: Verification | None = None
    engines: dict[str, EngineReport] = field(default_factory=dict)


def export(model: str | Path, out: str | Path, **options: Any) -> Built:
    """Audit a checkpoint and write its graph; options as for :func:`build`, which goes on from there."""
    return build(model, out, engine=None, verify=False, **options)


def build(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "bf16",
    keep: Sequence[str] = (),
    max_seq_len: int | None = None,
    layers: range | None = None,
    copy_weights: bool = False,
    cpu_weights: bool = True,
    engram_inside: bool = False,
    think_steps: int | None = None,
    draft: bool = False,
    state: str = AUTO,
    calibrate: str | Path | None = None,
    sharding: Sharding = WHOLE,
    expert_load: str | Path | None = None,
    scan_values: bool = True,
    force: bool = False,
    resume: bool = False,
    verify: bool = True,
    engine: EngineOptions | None = DEFAULT_ENGINE,
    device: str = "cpu",
    stages: Stages | None = None,
    on_boundary: Callable[[Boundary], None] = lambda _: None,
    on_line: Callable[[str], None] | None = None,
    command: str = "",
) -> Built:
    """From a checkpoint to a checked graph, an engine and a report, in a folder that appears whole or not at all.

    Args:
        model: a checkpoint directory.
        out: the bundle to make.
        precision: a name of ``v4export.precision.PRECISIONS``, or ``native``.
        keep: exceptions to it, each ``FORMAT:PATTERN`` (``v4export.precision.Keep``).
        max_seq_len: longest sequence; the model's own limit or 4096, whichever is less, unless given.
        layers: use only the first layers.
        copy_weights: copy shards instead of linking them.
        cpu_weights: write integer matrices once more, as onnxruntime's kernels for a CPU read them.
        engram_inside: make Engram tables part of the graph, which must be small enough.
        think_steps: of a thought, in place of the model's own; 0 leaves reasoning layers out.
        draft: export the first multi-token prediction layer, too, so that runs can draft tokens.
        state: ``auto`` keeps cached rows in the activations' type, ``fp8`` those that attention reads as E4M3.
        calibrate: text, or a file of :func:`calibrate`'s, for a recipe that rounds inputs by scales.
        sharding: share the model among ranks, each of which gets a graph and an engine of its own.
        expert_load: file that says how often each expert of a layer is chosen, by which they are dealt out.
        scan_values: look for NaN and infinity in every weight.
        force: replace an existing bundle.
        resume: go on with what an earlier build of ``out`` has left that was stopped.
        verify: compare the graph with the PyTorch definition.
        engine: what is asked of TensorRT; None builds no engine.
        device: that runs the graph while verifying.
        stages: shows progress and collects costs.
        on_boundary: told every comparison as it is made.
        on_line: told each line of TensorRT's log.
        command: recorded in the manifest and the report.

    Raises:
        NumbersDiffer: the graph is beyond a limit; the folder is kept as ``OUT.failed``.
        NotEnough: memory or disk; what is finished is kept for ``resume``.
        BadInput, NotSupported: nothing is left.
    """
    stages = stages or Stages(quiet=True)
    precision, note = recipe_for(model, precision, engine)
    asked = replace(find_precision(precision, keep=keep), state_fp8=state == FP8)
    by = None if calibrate is None else Path(calibrate)
    calibration.check_asked(asked, by)
    if engine:
        check_targets(engine, asked)
    with collected_seldom(), whole_folder(Path(out), force, resume, stages.say) as folder:
        units = Units(folder, folder.parent, common=[versions(), code_hash()], stages=stages)
        chosen = Chosen(first_layers(layers), engram_inside, think_steps, None if state == AUTO else state, draft)
        checkpoint = open_checkpoint(model, chosen)
        config = checkpoint.config
        found = find_precision(precision, config, keep)
        found.check(roles(config))
        _check_drafts(config, found, sharding)
        length = longest(config, max_seq_len)
        if engine:
            prefill_chunk(config, engine, length, found)
        load = read_expert_load(Path(expert_load)) if expert_load else None
        wanted = Asked(
            precision=precision, keep=tuple(keep), max_seq_len=length, layers=chosen.layers, copy_weights=copy_weights,
            cpu_weights=cpu_weights, engram_inside=engram_inside, think_steps=think_steps, draft=draft, state=state,
            calibrate=Source.of(calibrate), sharding=sharding, expert_load=Source.of(expert_load),
            scan_values=scan_values, verify=verify, engine=engine, device=device,
        )  # fmt: skip
        plan = None if sharding.is_one else Plan.of(config, found, sharding, load)
        made: dict[str, Any] = {"copy_weights": copy_weights, "cpu_weights": cpu_weights}
        planned = foresee(checkpoint, found, length, Path(out), engine, verify=verify, sharding=sharding, **made)
        facts: dict[str, Any] = {"plan": planned}
        account = account_of(checkpoint, scan_values, stages, units)
        words = token_map_of(config, checkpoint.directory)
        saved = calibration.saved_beside(Path(out))
        scales = by and calibration.scales_of(by, checkpoint, account, stages, token_map=words, saved=saved)
        rounding = wanted_scales(scales.values, config, found) if scales else None
        how = {"token_map": words, "scales": rounding, **made}
        graphs = export_graphs(config, account, found, folder, stages, **how, plan=plan, units=units)
        if scales:
            scales.write(folder / SCALES)
        copy_tokenizer(checkpoint.directory, folder)
        facts |= {
            "precision": precision,
            "precision_note": note,
            "keep": list(keep),
            "max_seq_len": length,
            "command": command,
            "config": checkpoint.config_json,
            "chosen": chosen,
            "asked": wanted,
            "sharing": json.loads(to_json(plan)),
            "thinking": _thinking(config),
            "calibration": scales.made if scales else None,
            "checkpoint": identity(checkpoint),
            "audit": {**account.counts, "summary": account.summary(), "skipped_tensors": account.skipped},
            "graphs": graphs,
        }
        bundle = Bundle(folder, facts, config, found, chosen, plan.sharding if plan else None)
        verification, engines = None, {}
        linked = frozenset(graphs.linked)
        made_of = [checkpoint.state, config, found, length, file_facts(folder, linked, units.hashes)]
        if verify:
            by_words = {"token_map": words, "device": device}
            verification = _verified_once(units, made_of, bundle, account, stages, on_boundary, **by_words)
            facts["verification"] = verification.summary()
        if engine and (verification is None or verification.passed):
            engines = _engines(bundle, engine, stages, on_line, units, made_of)
            facts["engines"] = engines
        facts["stages"] = stages.done
        if verification or engines:
            write_report(folder, facts, config, verification, engines, compared(folder, facts))
        write_manifest(folder, facts, linked, units.hashes)
        if verification:
            verification.check()
    saved.unlink(missing_ok=True)
    opened, notes = Bundle.open(Path(out)), [note] if note else []
    if engines and THINKING in graphs.files and THINKING not in engines:
        notes.append(f"{THINKING} has no engine: its steps share narrow matrices. think_step.engine thinks the same.")
    return Built(opened, account.summary(), graphs, tuple(notes), verification, engines)


def _check_drafts(config: ModelConfig, precision: Precision, sharding: Sharding) -> None:
    """Raises NotSupported where a layer that drafts cannot be had with the rest of what is asked for."""
    for what, there, fix in (
        ("a recipe that rounds inputs by scales", precision.inputs, "choose another --precision"),
        ("ranks", not sharding.is_one, "leave --tp --ep --pp out"),
    ):
        if config.drafts and there:
            raise NotSupported(f"drafts cannot be had with {what}", fix=f"{fix}, or leave --draft out")


def recipe_for(model: str | Path, precision: str, engine: EngineOptions | None) -> tuple[str, str | None]:
    """The recipe that a build takes for what was asked, and a sentence for the user where it is another one.

    ``native`` is what the checkpoint has; an engine's targets may lack a type (``engine.options.precision_for``).
    """
    if precision == NATIVE:
        precision = native(open_checkpoint(model).config)
    return precision_for(engine, precision) if engine else (precision, None)


def _engines(
    bundle: Bundle,
    options: EngineOptions,
    stages: Stages,
    on_line: Callable[[str], None] | None,
    units: Units,
    made_of: Any = None,
) -> dict[str, EngineReport]:
    """The engine of each graph of a bundle, by the graph's name."""
    depends = [made_of, options, [device.capability for device in cuda_devices()]]
    precisions, reports = engine_precisions(bundle.folder, bundle.config, bundle.precision), {}
    with stages.stage("engine", len(precisions)) as advance:
        for name, precision in precisions.items():
            graph = bundle.folder / name
            source, notes = _for_engine(graph, options, precision, units)
            file = graph.with_suffix(ENGINE_SUFFIX).name
            making = partial(engine_of, source, bundle.config, bundle.max_seq_len, precision, options, on_line)

            def made(at: At, file: str = file, making: Callable[[Path], EngineReport] = making) -> EngineReport:
                return making(at(file))

            report = units.once(file, depends, EngineReport, made)
            reports[name] = replace(report, warnings=[*notes, *report.warnings])
            advance(1)
    return reports


def _for_engine(graph: Path, options: EngineOptions, precision: Precision, units: Units) -> tuple[Path, list[str]]:
    """The graph that an engine is built from: itself, or a copy beside it whose ops are launches of kernels, or with
    bodies in place that TensorRT cannot put there; and which ops keep their bodies though kernels were wanted.
    """
    way, budget = plugin_plan(options, precision)

    def written(conversions: Sequence[Conversion]) -> Mapping[str, Placed]:
        return write_weights(conversions, units, graph.with_suffix(ENGINE_SUFFIX).name, lambda _: None)

    model, kept = lower_for_engine(graph, lambda op: implementation(op, way).way == PLUGIN, budget, written)
    if model is None:
        return graph, []
    source = graph.with_name(for_engine(graph.name))
    ir.save(model, source)
    return source, [f"{op} is computed by its body: {reason}" for op, reason in kept.items()]


def _thinking(config: ModelConfig) -> dict[str, Any] | None:
    """What a manifest says of thoughts: their steps, and when ``--think auto`` pauses."""
    r = config.reasoning
    return {"steps": r.steps, "confidence": r.confidence, "threshold": r.threshold} if r and config.thinks else None


def engine(
    folder: str | Path,
    options: EngineOptions,
    *,
    stages: Stages | None = None,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, EngineReport]:
    """Build the engines of an exported bundle's graphs and record them in the manifest; former ones are replaced.

    Raises:
        BadInput: a file of the bundle has changed that is no engine.
    """
    bundle = Bundle.open(Path(folder))
    bundle.check_files(but=ENGINE_SUFFIX)
    if options.refit_from:
        Bundle.open(options.refit_from).check_files()
    engines = _engines(bundle, options, stages or Stages(quiet=True), on_line, Units(bundle.folder))
    facts = {k: v for k, v in bundle.manifest.items() if k not in WRITTEN}
    facts |= {"engines": engines, "asked": {**facts.get("asked", {}), "engine": options}}
    write_manifest(bundle.folder, facts, frozenset(facts["graphs"]["linked"]))
    return engines


def _verified_once(
    units: Units,
    made_of: Any,
    bundle: Bundle,
    account: Audit,
    stages: Stages,
    on_boundary: Callable[[Boundary], None],
    **options: Any,
) -> Verification:
    """Verify, unless the same files have passed before."""
    depends = [made_of, options["device"]]
    before = units.find("verification", depends, Verification)
    if before:
        for boundary in before.boundaries:
            on_boundary(boundary)
        return before

    def made(_: At) -> Verification:
        return verified(bundle, account, stages, on_boundary, **options)

    return units.make("verification", depends, made, worth=lambda found: found.passed)


def verified(
    bundle: Bundle, account: Audit, stages: Stages, on_boundary: Callable[[Boundary], None], **options: Any
) -> Verification:
    """Verify with progress."""
    with stages.stage("verify", expected_boundaries(bundle.config)) as advance:

        def show(boundary: Boundary) -> None:
            advance(1)
            on_boundary(boundary)

        return verify_bundle(bundle, account.weights, advance=show, **options)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what the text side of a bundle needs."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
