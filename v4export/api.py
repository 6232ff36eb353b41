"""The verbs as Python functions. The command line calls these and prints what they return."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from v4export import presets
from v4export.checkpoint.audit import Audit, audit
from v4export.checkpoint.count import ParameterCounts, parameter_counts
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth as write_checkpoint
from v4export.config import ModelConfig
from v4export.config.chosen import UNCHANGED, Chosen
from v4export.config.readers import read_config
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
from v4export.engram.vocabulary import read_token_map
from v4export.errors import BadInput
from v4export.graphs.export import THINKING, Graphs, engine_precisions, export_graphs, for_plugins
from v4export.graphs.lower import lower_for_plugins
from v4export.package.bundle import Bundle, whole_folder, write_manifest
from v4export.precision import precision as find_precision
from v4export.progress import Stages
from v4export.runtime.generate import Generation, run_text
from v4export.runtime.onnx import OnnxExecutor
from v4export.runtime.pausing import Pausing
from v4export.runtime.sampling import Sampling
from v4export.runtime.tokenizer import TOKENIZER_FILES, load_tokenizer
from v4export.state_contract import bytes_per_token, fixed_bytes
from v4export.verify.boundary import Boundary
from v4export.verify.compare import expected_boundaries
from v4export.verify.report import write_report
from v4export.verify.verification import Verification, verify_bundle

_IMAGE = "it stands for an image, and text alone is exported"

#: Longest sequence of a bundle, where neither the user nor the model says less.
DEFAULT_MAX_SEQ_LEN = 4096


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


@dataclass(frozen=True)
class Inspection:
    """What a model is. State is in 16 bits; ``dtypes`` counts stored tensors and is empty for a preset."""

    config: ModelConfig
    parameters: ParameterCounts
    state_bytes_per_token: float
    state_bytes_fixed: int
    dtypes: dict[str, int] = field(default_factory=dict)
    stored_bytes: int = 0
    audit: str | None = None


def open_checkpoint(model: str | Path, chosen: Chosen = UNCHANGED) -> Checkpoint:
    """A checkpoint directory, its model changed as the user chose.

    Raises:
        BadInput: there is no such directory, or it is not a checkpoint this project reads, or it lacks what was chosen.
    """
    path = Path(model)
    if not path.exists() and str(model) in presets.names():
        raise BadInput(
            f"{model} is a preset: a configuration without weights",
            fix=f"make random weights for it: v4export synth {model} -o DIR",
        )
    if not path.exists():
        raise BadInput(
            f"{model} is neither a directory nor a preset",
            f"presets: {', '.join(presets.names())}",
            "give a Hugging Face checkpoint directory",
        )
    checkpoint = Checkpoint.open(path)
    return replace(checkpoint, config=chosen.of(checkpoint.config))


def inspect(model: str | Path) -> Inspection:
    """Say what a checkpoint directory or a preset is, without reading a weight."""
    if not Path(model).exists() and str(model) in presets.names():
        return _inspection(presets.load(str(model)))
    checkpoint = open_checkpoint(model)
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    summary = audit(checkpoint, scan_values=False).summary()
    return replace(_inspection(checkpoint.config), dtypes=dtypes, stored_bytes=checkpoint.nbytes, audit=summary)


def _inspection(config: ModelConfig) -> Inspection:
    return Inspection(config, parameter_counts(config), bytes_per_token(config), fixed_bytes(config))


def export(model: str | Path, out: str | Path, **options: Any) -> Built:
    """Audit a checkpoint and write its graph; options as for :func:`build`, which goes on from there."""
    return build(model, out, engine=None, verify=False, **options)


def build(
    model: str | Path,
    out: str | Path,
    *,
    precision: str = "bf16",
    max_seq_len: int | None = None,
    layers: range | None = None,
    copy_weights: bool = False,
    engram_inside: bool = False,
    think_steps: int | None = None,
    scan_values: bool = True,
    force: bool = False,
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
        precision: a name of ``v4export.precision.PRECISIONS``.
        max_seq_len: longest sequence; the model's own limit or 4096, whichever is less, unless given.
        layers: use only the first layers.
        copy_weights: copy shards instead of linking them.
        engram_inside: make Engram tables part of the graph, which must be small enough.
        think_steps: of a thought, in place of the model's own; 0 leaves reasoning layers out.
        scan_values: look for NaN and infinity in every weight.
        force: replace an existing bundle.
        verify: compare the graph with the PyTorch definition.
        engine: what is asked of TensorRT; None builds no engine.
        device: that runs the graph while verifying.
        stages: shows progress and collects costs.
        on_boundary: told every comparison as it is made.
        on_line: told each line of TensorRT's log.
        command: recorded in the manifest and the report.

    Raises:
        NumbersDiffer: the graph is beyond a limit; the folder is kept as ``OUT.failed``.
        BadInput, NotEnough, NotSupported: nothing is left.
    """
    stages = stages or Stages(quiet=True)
    note = None
    if engine:
        precision, note = precision_for(engine, precision)
        check_targets(engine, precision)
    with whole_folder(Path(out), force) as folder:
        chosen = Chosen(_first(layers), engram_inside, think_steps)
        checkpoint, account = audited(model, chosen, scan_values, stages)
        config = checkpoint.config
        found = find_precision(precision, config)
        length = _longest(config, max_seq_len)
        if engine:
            prefill_chunk(config, engine, length, precision)
        words = _words(config, checkpoint.directory)
        graphs = export_graphs(config, account, found, folder, stages, token_map=words, copy_weights=copy_weights)
        copy_tokenizer(checkpoint.directory, folder)
        facts: dict[str, Any] = {
            "precision": precision,
            "precision_note": note,
            "max_seq_len": length,
            "command": command,
            "config": checkpoint.config_json,
            "chosen": chosen,
            "thinking": _thinking(config),
            "checkpoint": {"path": str(checkpoint.directory.resolve()), "header_sha256": checkpoint.header_hash},
            "audit": {**account.counts, "summary": account.summary(), "skipped_tensors": account.skipped},
            "graphs": graphs,
        }
        bundle = Bundle(folder, facts, config, found, chosen)
        verification, engines = None, {}
        if verify:
            verification = _verified(bundle, account, stages, on_boundary, token_map=words, device=device)
            facts["verification"] = verification.summary()
        if engine and (verification is None or verification.passed):
            engines = _engines(bundle, engine, stages, on_line)
            facts["engines"] = engines
        facts["stages"] = stages.done
        if verification or engines:
            write_report(folder, facts, config, verification, engines)
        write_manifest(folder, facts, frozenset(graphs.linked))
        if verification:
            verification.check()
    opened, notes = Bundle.open(Path(out)), [note] if note else []
    if engines and THINKING in graphs.files and THINKING not in engines:
        notes.append(f"{THINKING} has no engine: its steps share FP8 blocks. think_step.engine thinks the same.")
    return Built(opened, account.summary(), graphs, tuple(notes), verification, engines)


def _engines(
    bundle: Bundle, options: EngineOptions, stages: Stages, on_line: Callable[[str], None] | None
) -> dict[str, EngineReport]:
    """The engine of each graph of a bundle, by the graph's name."""
    precisions, reports = engine_precisions(bundle.folder, bundle.precision), {}
    with stages.stage("engine", len(precisions)) as advance:
        for name, precision in precisions.items():
            graph = bundle.folder / name
            source, notes = _with_plugins(graph, options, precision)
            how = (bundle.config, bundle.max_seq_len, precision, options, on_line)
            report = engine_of(source, *how, engine=graph.with_suffix(ENGINE_SUFFIX))
            reports[name] = replace(report, warnings=[*notes, *report.warnings])
            advance(1)
    return reports


def _with_plugins(graph: Path, options: EngineOptions, precision: str) -> tuple[Path, list[str]]:
    """The graph that an engine is built from: itself, or a copy beside it whose ops are launches of kernels; and which
    ops keep their bodies though kernels were wanted.
    """
    way, budget = plugin_plan(options, precision)
    if way == "none":
        return graph, []
    model, kept = lower_for_plugins(graph, lambda op: implementation(op, way).way == PLUGIN, budget)
    source = graph.with_name(for_plugins(graph.name))
    ir.save(model, source)
    return source, [f"{op} is computed by its body: {reason}" for op, reason in kept.items()]


def _words(config: ModelConfig, directory: Path) -> np.ndarray | None:
    """Token id -> compressed id, by which Engram looks rows up."""
    return read_token_map(directory, config.engram, config.vocab_size) if config.engram else None


def _thinking(config: ModelConfig) -> dict[str, Any] | None:
    """What a manifest says of thoughts: their steps, and when ``--think auto`` pauses."""
    r = config.reasoning
    return {"steps": r.steps, "confidence": r.confidence, "threshold": r.threshold} if r and config.thinks else None


def _first(layers: range | None) -> int | None:
    """How many first layers a range is."""
    if layers is not None and layers.start:
        values = f"{layers.start}:{layers.stop}"
        raise BadInput("layers that are not the first ones cannot be had alone", values, "give --layers 0:N")
    return None if layers is None else layers.stop


def verify(
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    prompts: Sequence[Sequence[int]] | None = None,
    decode: int = 32,
    stages: Stages | None = None,
    on_boundary: Callable[[Boundary], None] = lambda _: None,
) -> Verification:
    """Compare a bundle with its checkpoint again; nothing is written.

    Args:
        folder: of the bundle.
        checkpoint: where its checkpoint is now, if it has moved.
        device: ``cpu`` or ``cuda``.
        prompts: token ids; built-in text unless given.
        decode: tokens to decode after each prompt.
        stages: shows progress and collects costs.
        on_boundary: told every comparison as it is made.

    Raises:
        BadInput: the checkpoint is not the one the bundle was made from, or a file of the bundle has changed.
    """
    stages = stages or Stages(quiet=True)
    bundle = Bundle.open(Path(folder))
    bundle.check_files()
    opened, account = audited(checkpoint or bundle.source, bundle.chosen, False, stages)
    recorded = bundle.manifest["checkpoint"]["header_sha256"]
    if opened.header_hash != recorded:
        raise BadInput(
            f"{opened.directory} is not the checkpoint that {folder} was made from",
            f"header hash {opened.header_hash[:12]}, the manifest has {recorded[:12]}",
            "give the right one with --checkpoint, or build again",
        )
    words = _words(bundle.config, opened.directory)
    how = {"token_map": words, "device": device, "prompts": prompts, "decode": decode}
    return _verified(bundle, account, stages, on_boundary, **how)


def engine(
    folder: str | Path,
    options: EngineOptions,
    *,
    stages: Stages | None = None,
    on_line: Callable[[str], None] | None = None,
) -> dict[str, EngineReport]:
    """Build the engines of an exported bundle's graphs and record them in the manifest; former ones are replaced."""
    bundle = Bundle.open(Path(folder))
    engines = _engines(bundle, options, stages or Stages(quiet=True), on_line)
    facts = {k: v for k, v in bundle.manifest.items() if k not in ("format", "versions", "files")}
    facts["engines"] = engines
    write_manifest(bundle.folder, facts, frozenset(facts["graphs"]["linked"]))
    return engines


def run(
    folder: str | Path,
    *,
    prompt: str | None = None,
    prompt_file: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    skip_decoder: bool = False,
    think: str | None = None,
    think_threshold: float | None = None,
    threads: int = 0,
    device: str = "cpu",
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Generate text from a bundle with onnxruntime; ``on_text`` is told text as it comes.

    With ``skip_decoder``, all but the last tokens of a prompt pass only the layers before the decoder (V4.1). A model
    with reasoning layers pauses to ``think``: a number of steps before every token, ``auto`` where it is not sure
    (``think_threshold`` in place of the manifest's), or ``off``; ``auto`` unless given.
    """
    if (prompt is None) == (prompt_file is None):
        raise BadInput("a prompt is needed, once", fix="give --prompt TEXT or --prompt-file FILE")
    if prompt is None:
        try:
            prompt = Path(prompt_file or "").read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read {prompt_file}", str(error), "give a text file in UTF-8") from error
    bundle = Bundle.open(Path(folder))
    pausing = Pausing.read(think, bundle.thinking, think_threshold)
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    return run_text(
        OnnxExecutor(
            bundle.folder,
            bundle.config,
            bundle.precision,
            max_seq_len=bundle.max_seq_len,
            device=device,
            threads=threads,
        ),
        load_tokenizer(bundle.folder),
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_strings=stop,
        stop_ids=frozenset(bundle.config.eos_token_ids),
        ignore_eos=ignore_eos,
        skip_decoder=skip_decoder,
        pausing=pausing,
        refused_ids={} if bundle.config.image_token_id is None else {bundle.config.image_token_id: _IMAGE},
        on_text=on_text,
    )


def synth(
    config: str,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    sparse: bool = False,
    fused: bool = False,
    stages: Stages | None = None,
) -> Path:
    """Write a checkpoint with random weights for a preset or a ``config.json``."""
    model = presets.load(config) if config in presets.names() else _config_file(config)
    with (stages or Stages(quiet=True)).stage("synth", 2 * parameter_counts(model).total) as advance:
        return write_checkpoint(model, Path(out), seed=seed, dtype=dtype, sparse=sparse, fused=fused, advance=advance)


def preset_names() -> list[str]:
    """Names of the presets."""
    return presets.names()


def _config_file(config: str) -> ModelConfig:
    if not Path(config).exists():
        presets.load(config)  # its error names presets that look alike
    return read_config(Path(config))


def _verified(
    bundle: Bundle, account: Audit, stages: Stages, on_boundary: Callable[[Boundary], None], **options: Any
) -> Verification:
    """Verify with progress."""
    with stages.stage("verify", expected_boundaries(bundle.config)) as advance:

        def show(boundary: Boundary) -> None:
            advance(1)
            on_boundary(boundary)

        return verify_bundle(bundle, account.weights, advance=show, **options)


def _longest(config: ModelConfig, asked: int | None) -> int:
    """Longest sequence of a bundle."""
    own = config.max_position_embeddings
    if asked and asked > own:
        raise BadInput(
            "--max-seq-len is longer than the model",
            f"{asked}, max_position_embeddings is {own}",
            f"give at most {own}",
        )
    return asked or min(DEFAULT_MAX_SEQ_LEN, own)


def audited(model: str | Path, chosen: Chosen, scan_values: bool, stages: Stages) -> tuple[Checkpoint, Audit]:
    """Open and audit a checkpoint."""
    checkpoint = open_checkpoint(model, chosen)
    with stages.stage("audit", checkpoint.nbytes) as advance:
        return checkpoint, audit(checkpoint, scan_values=scan_values, advance=advance)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what the text side of a bundle needs."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
