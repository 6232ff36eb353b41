"""What is asked of an engine, and the way from a bundle's graph to one: refuse early, preflight, build."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from v4export.config import ModelConfig
from v4export.engine.backend import choose_backend, cuda_devices
from v4export.engine.build import EngineReport, build_engine
from v4export.engine.implementations import resolve_way, shared_budget
from v4export.engine.preflight import preflight
from v4export.engine.profiles import ShapeOverride
from v4export.engine.refit import same_but_weights
from v4export.engine.scratch import scratch
from v4export.engine.targets import buildable, fallback, resolve_targets
from v4export.errors import BadInput, NotSupported, missing_package
from v4export.plugins.kernels import nvrtc
from v4export.plugins.limits import MAX_ELEMENTS
from v4export.precision import PRECISIONS, Precision

#: An engine lies beside its graph, and has its name.
ENGINE_SUFFIX = ".engine"

#: Scratch memory that an engine's prefill may take at one place, where the user does not choose the chunk.
_SCRATCH_BYTES = 1 << 30
_MAX_CHUNK = 512


@dataclass(frozen=True)
class EngineOptions:
    """What is asked of an engine.

    Attributes:
        targets: compute capabilities or device names; all that the precision allows, unless given.
        backend: ``tensorrt`` or ``tensorrt_rtx``.
        max_batch: most sequences.
        max_chunk: most new tokens of a prefill step; as many as 1 GiB of scratch memory allows, unless given.
        workspace_gib: limit on the builder's own scratch memory.
        shapes: a user's own shapes in place of the derived profiles.
        plugins: how kernels get in, a name of ``implementations.WAYS``; the package's default unless given.
        weight_streaming: let a program keep weights in host memory and send them as they are needed.
        refit: let a program replace the engine's weights.
        refit_from: a bundle of another checkpoint of the same model, whose engines get these weights.
    """

    targets: Sequence[str] | None = None
    backend: str | None = None
    max_batch: int = 1
    max_chunk: int | None = None
    workspace_gib: float | None = None
    shapes: ShapeOverride | None = None
    plugins: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    refit_from: Path | None = None


#: Both profiles, for every target that has the precision.
DEFAULT_ENGINE = EngineOptions()


def check_targets(options: EngineOptions, precision: Precision) -> None:
    """Refuse a target that cannot have the precision before any work is done."""
    if plugin_plan(options, precision)[0] != "none":
        try:
            nvrtc.version()
        except ImportError as e:
            raise missing_package("nvidia-cuda-nvrtc", "gpu", "Compiling kernels for plugins") from e


def plugin_plan(options: EngineOptions, precision: Precision) -> tuple[str, int]:
    """How kernels get into the engine, and the bytes of shared memory that a launch may have there."""
    backend, present = choose_backend(options.backend), [device.capability for device in cuda_devices()]
    way = _way(options)
    targets = resolve_targets(options.targets, precision, backend, present, way != "none")
    return way, shared_budget(way, targets)


def _way(options: EngineOptions) -> str:
    return resolve_way(options.plugins, choose_backend(options.backend))


def precision_for(options: EngineOptions, precision: str) -> tuple[str, str | None]:
    """The precision to export for an engine, and a sentence for the user where it is another than the one asked for.

    Where targets are given, or are this machine's GPUs because ``tensorrt`` builds for no others, all of them must have
    the precision, or get the one of ``targets.FALLBACK``. Where none is given, the precision chooses the targets.

    Raises:
        BadInput: a target or a backend is unknown.
        NotSupported: the backend is not installed, or cannot work here.
    """
    names = list(options.targets or ())
    if not names and choose_backend(options.backend) == "tensorrt":
        names = [target.name for target in buildable("tensorrt", [device.capability for device in cuda_devices()])]
    return fallback(names, precision, bool(names) and _way(options) != "none")


def prefill_chunk(
    config: ModelConfig, options: EngineOptions, max_seq_len: int, precision: Precision = PRECISIONS["bf16"]
) -> int:
    """New tokens of a prefill step: what was asked, or what the scratch memory and TensorRT's tensors allow.

    Raises:
        NotSupported: a tensor would have more elements than TensorRT takes, in the chunk asked for or in any.
    """
    wide = precision.activations == "float32"  # too wide for many a launch, which leaves bodies
    plugins = not wide and _way(options) != "none"
    places = scratch(config, max_seq_len, 4 if wide else 2, plugins)
    tightest = min(places, key=lambda place: place.most_tokens)
    most = tightest.most_tokens // options.max_batch
    if most < (options.max_chunk or 1):
        raise NotSupported(
            f"{tightest.what} of a prefill step would have more elements than TensorRT takes",
            f"{tightest.elements} a token, {options.max_batch} x {options.max_chunk or 1} tokens, limit {MAX_ELEMENTS}",
            f"Give --max-chunk {most} or less." if most else "Give a smaller --max-batch or --max-seq-len.",
        )
    if options.max_chunk:
        return options.max_chunk
    held = options.max_batch * max(place.bytes for place in places)
    return max(1, min(_MAX_CHUNK, most, _SCRATCH_BYTES // held))


def engine_of(
    graph: Path,
    config: ModelConfig,
    max_seq_len: int,
    precision: Precision,
    options: EngineOptions,
    on_line: Callable[[str], None] | None = None,
    engine: Path | None = None,
) -> EngineReport:
    """Build the engine of a graph beside it, under its name unless ``engine`` is given.

    ``on_line`` is told each line of TensorRT's log.

    Raises:
        NotSupported: TensorRT would refuse the graph.
    """
    problems = [p for p in preflight(graph) if p.severity == "error"]
    if problems:
        first = problems[0]
        raise NotSupported(
            f"TensorRT would refuse the graph: {first.rule}", f"{first.where}: {first.message}", first.fix
        )
    before = _refittable(options.refit_from, graph) if options.refit_from else None
    report = build_engine(
        graph,
        engine or graph.with_suffix(ENGINE_SUFFIX),
        precision=precision,
        targets=options.targets,
        backend=options.backend,
        max_batch=options.max_batch,
        max_seq_len=max_seq_len,
        max_chunk=min(prefill_chunk(config, options, max_seq_len, precision), max_seq_len),
        max_steps=config.reasoning.steps if config.reasoning and config.thinks else 1,
        workspace_gib=options.workspace_gib,
        shapes=options.shapes,
        plugins=_way(options),
        weight_streaming=options.weight_streaming,
        refit=options.refit,
        refit_from=before,
        on_line=on_line,
    )
    return replace(report, path=Path(report.path.name))


def _refittable(bundle: Path, graph: Path) -> Path:
    """The engine of another bundle's graph that differs from this one in its weights alone.

    Raises:
        BadInput: there is none.
    """
    other, engine = bundle / graph.name, (bundle / graph.name.split(".")[0]).with_suffix(ENGINE_SUFFIX)
    for file in (other, engine):
        if not file.is_file():
            raise BadInput(
                f"{bundle} has no engine to refit", f"missing: {file}", "give a bundle that was built with --refit"
            )
    if not same_but_weights(other, graph):
        raise BadInput(
            f"{other} is another graph than {graph}",
            "only weights can be replaced: model, recipe, --layers and --keep have to be the same",
            "leave --refit-from out",
        )
    return engine
