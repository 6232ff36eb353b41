"""Bisects a bundle: with the PyTorch definition of its checkpoint, or with another bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from v4export.bisect.asked import Asked
from v4export.bisect.cause import node_faults
from v4export.bisect.feeds import is_small, steps_of
from v4export.bisect.found import told, told_of_silent
from v4export.bisect.graph import Arrays
from v4export.bisect.graphs import Bisected
from v4export.bisect.result import Bisection
from v4export.bisect.runners import of_bundle
from v4export.bisect.search import Parting
from v4export.building import export
from v4export.checkpoint.activation_scales import FILE as SCALES
from v4export.config.chosen import AUTO, FP8
from v4export.errors import BadInput, NotSupported
from v4export.graphs.export import PORTABLE, for_cpu, graphs_in
from v4export.opened import checkpoint_of, token_map_of
from v4export.package.bundle import Bundle
from v4export.progress import Stages
from v4export.runtime.tokenizer import load_tokenizer
from v4export.verify.boundary import Boundary
from v4export.verify.prompts import default_prompts
from v4export.verify.verification import Verification, verify_bundle

#: Nodes that are told of one by one, where no number shows a difference.
_TOLD = 8

_NO_NODE = "no node differs from a fresh export: it is the exporter that is wrong, or what is looked up for the graph"


def with_checkpoint(
    bundle: Bundle,
    asked: Asked,
    stages: Stages,
    sound: tuple[Bundle, dict[str, list[Arrays]]] | None = None,
    found: Verification | None = None,
) -> Bisection:
    """A bundle and the PyTorch definition of its checkpoint: the boundary by ``verify``, the node by a fresh export.

    Args:
        bundle: the bundle.
        asked: the rest.
        stages: shows progress.
        sound: an export of the same checkpoint, and what its graphs are fed, where they are there already.
        found: the bundle's verification, where it is there already.
    """
    opened_checkpoint, account = checkpoint_of(bundle, asked.checkpoint, stages)
    compared = f"{bundle.folder} with {opened_checkpoint.directory}"
    words, prompts = token_map_of(bundle.config, opened_checkpoint.directory), prompts_of(bundle, asked)
    summary = ""
    try:
        with stages.stage("verify"):
            found = found or verify_bundle(bundle, account.weights, token_map=words, prompts=prompts)
        bad, summary = [boundary for boundary in found.boundaries if not boundary.ok], found.summary()
    except NotSupported as error:
        bad = [_not_run(error)]
    if not bad:
        return Bisection(compared, notes=(summary,))
    # Weights come first in the report, but say nothing of where numbers part.
    first = next((boundary for boundary in bad if boundary.name != "weights"), bad[0])
    said = tuple(f"{b.name}: {note}" for b in dict.fromkeys((bad[0], first)) for note in b.notes[:3])
    with contextlib.ExitStack() as stack:
        if sound is None:
            folder = stack.enter_context(_scratch(bundle.folder))
            fresh = _fresh(bundle, opened_checkpoint.directory, folder / "fresh", stages)
            sound = fresh, steps(fresh, prompts, stages)
        with stages.stage("bisect"):
            result = _in_graphs(*sound, bundle, compared, asked, first.name, exact=True)
    result = replace(result, boundary=first.name, notes=(*said, *result.notes))
    if result.node is None:
        result = replace(result, notes=(*result.notes, _NO_NODE))
    return result


def _not_run(error: NotSupported) -> Boundary:
    return Boundary("start", False, 0.0, 0.0, 0.0, 1.0, "", notes=(error.what, error.values))


def with_bundle(bundle: Bundle, asked: Asked, stages: Stages) -> Bisection:
    """Two bundles, of the same model or of a changed one."""
    assert asked.against is not None
    reference = Bundle.open(asked.against)
    for one in (bundle, reference):
        one.check_files()
    if reference.config != bundle.config:
        raise BadInput(f"{bundle.folder} and {reference.folder} are different models", fix="give two of one model")
    exact = reference.precision == bundle.precision
    feeds = steps(reference, prompts_of(reference, asked), stages)
    with stages.stage("bisect"):
        compared = f"{bundle.folder} with {reference.folder}"
        return _in_graphs(reference, feeds, bundle, compared, asked, "", exact)


def _in_graphs(
    reference: Bundle,
    feeds: dict[str, list[Arrays]],
    bundle: Bundle,
    compared: str,
    asked: Asked,
    boundary: str,
    exact: bool,
) -> Bisection:
    """Search the layer of a boundary in all graphs, then all of them; portable ones, then onnxruntime's copies."""
    passed: dict[str, tuple[Bisected, Parting, bool]] = {}
    unmatched: dict[str, None] = {}
    pairs = list(_pairs(reference, bundle, feeds, boundary, copies=exact))
    if not pairs:
        names = f"{', '.join(graphs_in(bundle.folder))}; {', '.join(graphs_in(reference.folder))}"
        raise BadInput(f"{bundle.folder} and {reference.folder} have no graph in common", names, "share both alike")
    part = _part(boundary)
    for only in dict.fromkeys((part, None)):
        for pair, portable, fed in pairs:
            sought = pair.search(fed, only)
            unmatched |= dict.fromkeys(pair.match.unmatched)
            if sought.parting:
                return told(compared, pair, sought.parting, portable, asked, tuple(passed), tuple(unmatched))
            passed |= {name: (pair, one, portable) for name, one in sought.passed.items()}
    if boundary:
        # What is beyond a layer's limit need not be beyond a node's own: the one that comes nearest.
        nearest = max(passed.values(), key=lambda one: one[1].excess, default=None)
        if nearest:
            return told(compared, *nearest, asked, tuple(passed), tuple(unmatched))
    silent = (
        [(pair, *fault) for pair, _, _ in pairs for fault in node_faults(pair.reference, pair.other)] if exact else []
    )
    if boundary and silent:
        return told_of_silent(compared, *silent[0])
    lines = [f"{pair.other.nodes[i].name} of {pair.name}: {'; '.join(causes)}" for pair, i, causes in silent[:_TOLD]]
    notes = (f"{len(silent)} nodes are not alike, and no number shows it:", *lines) if silent else ()
    return Bisection(compared, passed=tuple(passed), unmatched=tuple(unmatched), notes=notes)


#: How the names of graphs begin that a boundary is of, by its first word; of others it is the model's own.
_ABOUT = {"thought": "think", "reasoning": "think", "draft": "draft"}


def _pairs(
    reference: Bundle, bundle: Bundle, feeds: dict[str, list[Arrays]], boundary: str, copies: bool
) -> Iterator[tuple[Bisected, bool, list[Arrays]]]:
    """Graphs that both bundles have, portable ones first; those of thoughts or drafts ahead where these differ."""
    theirs = set(graphs_in(reference.folder))
    names = [name for name in graphs_in(bundle.folder) if name in theirs]
    about = _ABOUT.get(boundary.partition(" ")[0], PORTABLE)
    names.sort(key=lambda name: not name.startswith(about))
    for portable in (True, False)[: 1 + copies]:
        for name in names:
            fed = [one for one in feeds.get(name, []) if not portable or is_small(one)]
            file = name if portable else for_cpu(name)
            sound, other = (of_bundle(one.folder, file, portable) for one in (reference, bundle))
            yield Bisected(file, sound, other, exact=copies), portable, fed


def _part(boundary: str) -> str | None:
    """The part of a graph that a boundary of ``verify`` stands for; None for the whole."""
    words = boundary.split()
    if boundary.startswith("layer "):
        return " ".join(words[:2])
    return {"embedding": "embed", "logits": "head"}.get(boundary)


def prompts_of(bundle: Bundle, asked: Asked) -> list[list[int]]:
    """What is run: the prompt that was given, or built-in text."""
    if asked.prompt is None:
        return default_prompts(bundle.folder, bundle.config, bundle.max_seq_len // 2, asked.seed)
    tokens = load_tokenizer(bundle.folder).encode(asked.prompt)
    return [tokens[: bundle.max_seq_len // 2]]


def steps(bundle: Bundle, prompts: Sequence[Sequence[int]], stages: Stages) -> dict[str, list[Arrays]]:
    """What a bundle's graphs are fed, by their names."""
    with stages.stage("reference"):
        return steps_of(bundle, prompts)


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """A folder beside a bundle, so that weights can be links; elsewhere where none can be made there."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".bisect.", dir=beside.resolve().parent)
    except OSError:
        folder = tempfile.TemporaryDirectory()
    with folder as name:
        yield Path(name)


def _fresh(bundle: Bundle, checkpoint: Path, out: Path, stages: Stages) -> Bundle:
    """What the exporter makes of a bundle's checkpoint now, by the same choices."""
    chosen, scales = bundle.chosen, bundle.folder / SCALES
    how: dict[str, Any] = {
        "precision": bundle.precision.name,
        "keep": bundle.manifest.get("keep", ()),
        "max_seq_len": bundle.max_seq_len,
        "layers": None if chosen.layers is None else range(chosen.layers),
        "engram_inside": chosen.engram_inside,
        "think_steps": chosen.think_steps,
        "state": FP8 if chosen.state == FP8 else AUTO,
        "calibrate": scales if scales.exists() else None,
    }
    return export(checkpoint, out, stages=stages, scan_values=False, **how).bundle
