"""Bisects graphs by polygraphy: foreign ones with each other, and what TensorRT makes of one with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from v4export.bisect.asked import Asked
from v4export.bisect.bundles import prompts_of, steps
from v4export.bisect.feeds import decoder_inputs, is_decoder, is_small
from v4export.bisect.found import told
from v4export.bisect.graph import Arrays, Graph
from v4export.bisect.graphs import Bisected
from v4export.bisect.result import Bisection
from v4export.bisect.runners import by_polygraphy, by_tensorrt, of_bundle, opened, random_inputs
from v4export.errors import BadInput
from v4export.graphs.export import PORTABLE
from v4export.package.bundle import Bundle
from v4export.progress import Stages

#: Random inputs that graphs are fed.
_FEEDS = 3


def foreign(subject: Path, asked: Asked, stages: Stages) -> Bisection:
    """Two ONNX files by polygraphy's runners, or one by two of them, over the same inputs."""
    reference = asked.against or subject
    sound = Graph(opened(reference), by_polygraphy(reference.parent), reference.parent)
    execute = (by_tensorrt if asked.engine else by_polygraphy)(subject.parent)
    pair = Bisected(subject.name, sound, Graph(opened(subject), execute, subject.parent), exact=False)
    compared = f"{subject} by TensorRT and by onnxruntime" if asked.engine else f"{subject} with {reference}"
    return _searched(pair, _inputs(sound, reference, asked), compared, asked, stages)


def with_engine(bundle: Bundle, asked: Asked, stages: Stages) -> Bisection:
    """What TensorRT makes of a bundle's portable graph, and what onnxruntime does."""
    bundle.check_files()
    feeds = [one for one in steps(bundle, prompts_of(bundle, asked), stages)[PORTABLE] if is_small(one)]
    sound = of_bundle(bundle.folder, PORTABLE, portable=True)
    other = Graph(sound.model, by_tensorrt(bundle.folder), bundle.folder)
    pair = Bisected(PORTABLE, sound, other, exact=False)
    return _searched(pair, feeds, f"{bundle.folder} by TensorRT and by onnxruntime", asked, stages)


def _searched(pair: Bisected, feeds: Sequence[Arrays], compared: str, asked: Asked, stages: Stages) -> Bisection:
    with stages.stage("bisect"):
        sought = pair.search(feeds)
    passed = tuple(sought.passed)
    if sought.parting:
        return told(compared, pair, sought.parting, False, asked, passed, pair.match.unmatched)
    return Bisection(compared, passed=passed, unmatched=pair.match.unmatched)


def _inputs(graph: Graph, file: Path, asked: Asked) -> list[Arrays]:
    """What foreign graphs are fed: a file's, those of the state contract, or what polygraphy makes up."""
    if asked.inputs is not None:
        try:
            given = dict(np.load(asked.inputs, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BadInput(f"{asked.inputs} is no file of inputs", str(error), "write it with numpy.savez") from error
        if missing := set(graph.inputs) - given.keys():
            raise BadInput(f"{asked.inputs} lacks inputs", ", ".join(sorted(missing)), f"give all of {file}")
        return [given]
    if is_decoder(graph.model):
        return [decoder_inputs(graph.model, asked.seed + i) for i in range(_FEEDS)]
    return random_inputs(file, asked.seed, _FEEDS)
