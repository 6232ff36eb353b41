"""The verbs as Python functions. The command line calls these and prints what they return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from v4export import presets
from v4export.bisect import verb as bisecting
from v4export.bisect.asked import Asked
from v4export.bisect.case import Replayed, replay
from v4export.bisect.result import Bisection
from v4export.building import Built, build, engine, export, recipe_for, verified
from v4export.bundles import package, package_cpp, run
from v4export.calibrate import verb as calibration
from v4export.calibrate.calibration import Calibration
from v4export.calibrate.magnitudes import PERCENTILE, Method
from v4export.checkpoint.audit import audit
from v4export.checkpoint.count import ParameterCounts, parameter_counts
from v4export.checkpoint.synth import synth as write_checkpoint
from v4export.config import ModelConfig
from v4export.config.chosen import AUTO, FP8, UNCHANGED, Chosen
from v4export.config.readers import read_config
from v4export.config.sharding import Sharding
from v4export.errors import BadInput
from v4export.evaluate import report as evaluation_report
from v4export.evaluate import verb as evaluation
from v4export.evaluate.recipes import ALL
from v4export.evaluate.results import Evaluation
from v4export.opened import audited, checkpoint_of, first_layers, open_checkpoint, token_map_of
from v4export.package.bundle import MANIFEST, Bundle
from v4export.package.whole import whole_folder
from v4export.plan import foreseen
from v4export.plan import verb as planning
from v4export.plan.devices import named_device
from v4export.plan.reads import are_repacked, reads
from v4export.plan.simulate import Simulation
from v4export.progress import Stages, peak_memory_mib
from v4export.repeating import Repeated, repeat
from v4export.runtime.bandwidth import read_bandwidth
from v4export.runtime.drafting import Drafting
from v4export.runtime.executors import ONNXRUNTIME, Choice
from v4export.runtime.speed import Floor, Speed, measure
from v4export.state_contract import bytes_per_token, fixed_bytes
from v4export.verify.boundary import Boundary
from v4export.verify.verification import Verification

__all__ = [
    "Bisection",
    "Built",
    "Inspection",
    "Repeated",
    "Replayed",
    "bench",
    "bisect",
    "build",
    "calibrate",
    "costs",
    "engine",
    "evaluate",
    "export",
    "inspect",
    "is_bundle",
    "open_checkpoint",
    "package",
    "package_cpp",
    "plan",
    "preset_names",
    "recipe_for",
    "repeat",
    "replay",
    "run",
    "simulate",
    "synth",
    "verify",
]


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


def plan(
    model: str | Path,
    *,
    layers: range | None = None,
    engram_inside: bool = False,
    think_steps: int | None = None,
    draft: bool = False,
    state: str = AUTO,
    no_engine: bool = False,
    no_verify: bool = False,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    **options: Any,
) -> planning.Plan:
    """What building a model, a directory's or a preset's, and running it will take; nothing is done.

    ``layers``, ``engram_inside``, ``think_steps``, ``draft`` and ``state`` are as of :func:`build`; ``tp``, ``ep`` and
    ``pp`` say how it is spread over devices (``v4export.plan.sharding``); others are as of ``v4export.plan.verb.plan``.

    Raises:
        BadInput, NotSupported: as a build would.
    """
    chosen = Chosen(first_layers(layers), engram_inside, think_steps, None if state == AUTO else state, draft)
    wanted: dict[str, Any] = {"engine": not no_engine, "verify": not no_verify, "sharding": Sharding(tp, ep, pp)}
    return planning.plan(model, chosen=chosen, **wanted, **options)


def bench(
    folder: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repetitions: int = 3,
    draft_max: int | None = None,
    threads: int = 0,
    device: str = "cpu",
    executor: str = ONNXRUNTIME,
    cuda_graphs: bool = True,
    kernels: bool = False,
    check_files: bool = True,
    stages: Stages | None = None,
) -> Speed:
    """Measure a bundle on this machine: random prompts, and the likeliest tokens after them; executors as of ``run``.

    One with a draft graph is run once more with ``draft_max`` tokens drafted ahead of a step, 1 unless given. On a CPU,
    also how fast memory is read by as many threads, and from that the least time of a decoded token.

    Raises:
        BadInput: it is no bundle, or holds fewer tokens, or has nothing to draft with.
    """
    bundle = Bundle.open(Path(folder)).checked(check_files)
    if device not in ("cpu", "cuda"):
        raise BadInput(f"--device {device} is not here to be measured", fix="give cpu or cuda, or --simulate N")
    opened = Choice(executor, device, threads, cuda_graphs=cuda_graphs, kernels=kernels).open(bundle)
    drafting = Drafting.of(draft_max, bundle.config.drafts)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    total = repetitions * (prompt_tokens + new_tokens) * (2 if drafting else 1)
    with (stages or Stages(quiet=True)).stage("bench", total) as advance:
        speed = measure(opened, bundle.config.vocab_size, drafting=drafting, advance=advance, **sizes)
    speed, floor = replace(speed, peak_mib=peak_memory_mib()), None
    if (executor, device) == (ONNXRUNTIME, "cpu"):
        context = prompt_tokens + new_tokens // 2
        held = {"widened": not kernels, "repacked": are_repacked(bundle.manifest["files"])}
        read = reads(bundle.config, bundle.precision, context, **held)
        floor = Floor(read.weights, read.state, read_bandwidth(threads))
    return replace(speed, floor=floor)


def simulate(
    model: str | Path,
    devices: int,
    *,
    device: str = "h200",
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    batch: int = 1,
    context: int = 4096,
    micro_batches: int | None = None,
    precision: str | None = None,
    link_gbs: float | None = None,
    link_us: float = 10.0,
    efficiency: float | None = None,
    costs: Path | None = None,
) -> Simulation:
    """Tokens a second, and memory, of a model on devices that are not there.

    Args:
        model: a bundle, a checkpoint directory or a preset's name.
        devices: how many.
        device: a name of ``v4export.plan.devices``.
        tp, ep, pp: how they are used; as suits the model, unless given.
        batch: sequences.
        context: cached tokens of each.
        micro_batches: of a pipeline.
        precision: a recipe; a bundle's own, else ``native``, unless given.
        link_gbs, link_us: between devices; bandwidth is the device's own, unless given.
        efficiency: of all parts, in place of the table's.
        costs: JSON of measured seconds of a layer, by its kind.

    Raises:
        BadInput: a name is unknown, or numbers do not go together.
    """
    return planning.simulated(
        model,
        devices,
        named_device(device),
        Sharding(tp, ep, pp),
        batch=batch,
        context=context,
        micro_batches=micro_batches,
        precision=precision,
        link=(link_gbs, link_us),
        efficiency=efficiency,
        costs=costs,
    )


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder is what a build leaves."""
    return (Path(folder) / MANIFEST).is_file()


def costs(folder: str | Path) -> list[foreseen.Cost]:
    """What each stage of a bundle's build was foreseen to take, and took."""
    bundle = Bundle.open(Path(folder))
    return foreseen.compared(bundle.folder, bundle.manifest)


def verify(
    folder: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    kernels: bool = False,
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
        kernels: check as well what this project's kernels for a CPU make of the graph.
        prompts: token ids; built-in text unless given.
        decode: tokens to decode after each prompt.
        stages: shows progress and collects costs.
        on_boundary: told every comparison as it is made.

    Raises:
        BadInput: the checkpoint is not the one the bundle was made from, or a file of the bundle has changed.
    """
    stages = stages or Stages(quiet=True)
    bundle = Bundle.open(Path(folder))
    opened, account = checkpoint_of(bundle, checkpoint, stages)
    words = token_map_of(bundle.config, opened.directory)
    how = {"token_map": words, "device": device, "kernels": kernels, "prompts": prompts, "decode": decode}
    return verified(bundle, account, stages, on_boundary, **how)


def bisect(
    subject: str | Path,
    *,
    against: str | Path | None = None,
    checkpoint: str | Path | None = None,
    prompt: str | None = None,
    inputs: str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: bool = False,
    stages: Stages | None = None,
) -> Bisection:
    """Find the first layer, then the first node, at which two executions part.

    Args:
        subject: a bundle, or an ONNX file.
        against: the reference, a bundle or an ONNX file; a bundle's checkpoint as PyTorch defines it, unless given.
        checkpoint: where a bundle's is now, if it has moved.
        prompt: text to run; built-in text unless given.
        inputs: ``.npz`` of inputs by name, for ONNX files; of the seed unless given.
        seed: of tokens and inputs that are random.
        out: folder to make of the smallest case that shows it, which appears whole or not at all.
        engine: compare what TensorRT makes of the graph, in pieces, with what onnxruntime does.
        stages: shows progress.

    Raises:
        BadInput: something is no bundle or graph, or the two do not go together.
        NotSupported: the reference cannot be run here.
    """
    paths = (None if path is None else Path(path) for path in (against, checkpoint, inputs, out))
    other, moved, fed, made = paths
    asked = Asked(other, moved, prompt, fed, seed, made, engine)
    return bisecting.bisect(Path(subject), asked, stages or Stages(quiet=True))


def evaluate(
    model: str | Path,
    *,
    text: str | Path,
    precision: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    state: str = AUTO,
    context: int | None = None,
    tokens: int | None = None,
    layers: range | None = None,
    calibrate: str | Path | None = None,
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    stages: Stages | None = None,
) -> Evaluation:
    """Measure what recipes cost in quality on a text, beside the float32 definition; of a bundle, its graph as well.

    Args:
        model: a checkpoint directory, or a bundle.
        text: UTF-8.
        precision: names of recipes, ``native`` or ``all``; all unless given, of a bundle its own.
        keep: exceptions to each, ``FORMAT:PATTERN``.
        state: ``fp8`` evaluates each once more with cached rows in E4M3.
        context: tokens of a window, 512 or the model's longest sequence unless given.
        tokens: most tokens of the text to use.
        layers: evaluate only the first layers, whose errors are all that is found then.
        calibrate: text, or a file of :func:`calibrate`'s, for recipes that round inputs by scales.
        checkpoint: where a bundle's checkpoint is now, if it has moved.
        out: folder to make of the results, which appears whole or not at all.
        device: that runs a bundle's graph.
        stages: shows progress.

    Raises:
        BadInput, NotEnough, NotSupported: nothing is left.
    """
    stages, folder = stages or Stages(quiet=True), Path(model)
    bundle = Bundle.open(folder) if (folder / MANIFEST).is_file() else None
    names = tuple(precision) if precision is not None else () if bundle else (ALL,)
    asked = evaluation.Asked(Path(text), names, tuple(keep), state == FP8, context, tokens, device)
    with nullcontext() if out is None else whole_folder(Path(out), force=False) as made:
        if bundle:
            if layers is not None:
                raise BadInput("the layers of a bundle are those it was made of", fix="leave --layers out")
            opened, account = checkpoint_of(bundle, checkpoint, stages)
        else:
            opened, account = audited(model, Chosen(first_layers(layers)), False, stages)
        words, scales = token_map_of(opened.config, opened.directory), None
        if calibrate is not None:
            saved = None if out is None else calibration.saved_beside(Path(out))
            scales = calibration.scales_of(
                Path(calibrate), opened, account, stages, token_map=words, saved=saved
            ).values
        found = evaluation.evaluate(
            str(model), opened, account, asked, stages, token_map=words, scales=scales, bundle=bundle
        )
        if made:
            evaluation_report.write(made, found)
    if out is not None:
        calibration.saved_beside(Path(out)).unlink(missing_ok=True)
    return found


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    method: str = "percentile",
    percentile: float = PERCENTILE,
    tokens: int = calibration.TOKENS,
    context: int | None = None,
    force: bool = False,
    stages: Stages | None = None,
) -> Calibration:
    """Find the scales by which ``--precision fp8-w8a8`` rounds inputs, and write them to a file.

    A run that is stopped goes on where it was, if it is called again with the same arguments.

    Args:
        model: a checkpoint directory.
        out: the file, ``.safetensors``.
        text: UTF-8, of the kind that the model will see.
        method: ``max``, ``percentile`` or ``mse``: which range FP8 is to cover.
        percentile: of magnitudes, for the method of that name.
        tokens: of the text to run.
        context: tokens of a sequence.
        force: replace ``out``.
        stages: shows progress.

    Raises:
        BadInput: ``out`` exists or is called otherwise, or the text does not suffice.
    """
    file, how = Path(out), Method(method, percentile)
    if file.suffix != calibration.SUFFIX:
        raise BadInput(f"{out} is no name of a file of scales", fix=f"give -o NAME{calibration.SUFFIX}")
    if file.exists() and not force:
        raise BadInput(f"{out} exists", fix="choose another -o, or replace it with --force")
    stages = stages or Stages(quiet=True)
    checkpoint, account = audited(model, UNCHANGED, False, stages)
    words, saved = token_map_of(checkpoint.config, checkpoint.directory), calibration.saved_beside(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    found = calibration.from_text(
        Path(text),
        checkpoint,
        account,
        stages,
        token_map=words,
        saved=saved,
        method=how,
        tokens=tokens,
        context=context,
    )
    found.scales.write(file)
    saved.unlink(missing_ok=True)
    return found


def synth(
    config: str,
    out: str | Path,
    *,
    seed: int = 0,
    dtype: str | None = None,
    draft: bool = False,
    sparse: bool = False,
    fused: bool = False,
    stages: Stages | None = None,
) -> Path:
    """Write a checkpoint with random weights for a preset or a ``config.json``.

    With ``draft``, it has one multi-token prediction layer, which others than V3's, V3.2's and V4's cannot have.
    """
    model = presets.load(config) if config in presets.names() else _config_file(config)
    model = Chosen(draft=True).of(replace(model, num_mtp_layers=1)) if draft else model
    with (stages or Stages(quiet=True)).stage("synth", 2 * parameter_counts(model).total) as advance:
        return write_checkpoint(model, Path(out), seed=seed, dtype=dtype, sparse=sparse, fused=fused, advance=advance)


def preset_names() -> list[str]:
    """Names of the presets."""
    return presets.names()


def _config_file(config: str) -> ModelConfig:
    if not Path(config).exists():
        presets.load(config)  # its error names presets that look alike
    return read_config(Path(config))
