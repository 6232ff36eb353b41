"""Evaluates recipes, and the graph of a bundle, on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from v4export.evaluate.budget import Budget
from v4export.evaluate.graph import graph_predictions
from v4export.evaluate.lane import Lane
from v4export.evaluate.products import WidenedProducts
from v4export.evaluate.recipes import Subject
from v4export.evaluate.results import Quality, RecipeResult
from v4export.evaluate.store import scratch
from v4export.evaluate.stream import Stream
from v4export.evaluate.windows import Windows
from v4export.package.bundle import Bundle


def steps(subject: Subject, lanes: Sequence[Lane], windows: Windows, cut: Budget, bundle: Bundle | None) -> int:
    """How often ``measure`` tells that it has advanced."""
    parts = subject.config.num_layers + (not subject.config.left_out_layers)
    return (len(lanes) + 1) * parts + (-(-len(windows.ids) // cut.windows) if bundle else 0)


def measure(
    subject: Subject,
    lanes: Sequence[Lane],
    windows: Windows,
    cut: Budget,
    *,
    bundle: Bundle | None = None,
    device: str = "cpu",
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[RecipeResult, ...]:
    """The reference, the recipes, and the graph of a bundle, in this order.

    Args:
        subject: the model. If layers are left out, only errors of those that are there are found.
        lanes: the recipes; the last is the bundle's, if there is one.
        windows: the text.
        cut: how the work is cut.
        bundle: whose graph is run.
        device: that runs the graph.
        advance: told each step.
    """
    reference, batches = subject.reference, list(windows.batches(cut.windows))
    with scratch(cut.on_disk) as store, torch.inference_mode(), WidenedProducts():
        stream = Stream(reference, lanes, batches, store, advance)
        layers = stream.layers()
        tokens = {} if subject.config.left_out_layers else stream.predictions(cut.chunk)
        sized = [subject.sized(lane) for lane in (reference, *lanes)]
        found = [_with(one, tokens.get(one.name), layers=tuple(layers.get(one.name, ()))) for one in sized]
        if bundle:
            kept = graph_predictions(bundle, reference, batches, store, cut.chunk, device, advance)
            found.append(_with(sized[-1], kept, name=f"graph ({sized[-1].name})"))
    return tuple(found)


def _with(one: RecipeResult, tokens_N5: np.ndarray | None, **changes: object) -> RecipeResult:
    quality = None if tokens_N5 is None else Quality.of(tokens_N5)
    return replace(one, quality=quality, **changes)  # type: ignore[arg-type]
