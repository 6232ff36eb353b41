"""Compares what a layer drafts with the PyTorch definition: it is a model of one layer, between ends of its own.

It goes on from what the graph itself has handed to it, so that its own boundaries are all that is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.names import drafter_prefix
from v4export.config import ModelConfig
from v4export.model.draft import DraftEntry
from v4export.precision import Precision
from v4export.verify import tolerance
from v4export.verify.boundary import Boundary, judge, relative
from v4export.verify.compare import Comparison, compared
from v4export.verify.recording import Recording

#: What the layer has of its own at its end, and what that is called in a model.
_ENDS = {"shared_head.norm.": "model.norm.", "hc_head.": "model.hc_head."}


def compare_drafts(
    weights: dict[str, Weight],
    config: ModelConfig,
    precision: Precision,
    recordings: Sequence[Recording],
    advance: Callable[[Boundary], None] = lambda _: None,
) -> list[Boundary]:
    """All boundaries of the layer that drafts, in order; none of a model without one."""
    if not config.drafts:
        return []
    own = [r.draft for r in recordings if r.draft is not None]
    return compared(lambda: DraftComparison(_of_layer(weights, config), config.drafter, precision, own), advance)


def _of_layer(weights: dict[str, Weight], config: ModelConfig) -> dict[str, Weight]:
    """Weights by their names in a model that has this layer alone."""
    found, prefix = {}, drafter_prefix(config)
    for name, weight in weights.items():
        leaf = name.removeprefix(prefix)
        if leaf != name:
            end = next((end for end in _ENDS if leaf.startswith(end)), None)
            found[_ENDS[end] + leaf.removeprefix(end) if end else f"model.layers.0.{leaf}"] = weight
    shared = ("model.embed_tokens.weight", "lm_head.weight")
    return found | {name: weights[name] for name in shared if name in weights}


class DraftComparison(Comparison):
    """Recordings of the layer; ``config`` is its own, and names of weights are as in it."""

    def run(self) -> Iterator[Boundary]:
        """Boundaries, one after another."""
        for boundary in super().run():
            yield replace(boundary, name=f"draft {boundary.name.replace('layer 0', 'layer')}")

    def _embedding(self) -> Boundary:
        """What the block is given, of the next token and of what was handed over."""
        entry, exact = self._pair(lambda: DraftEntry(self.config), 0)
        path = tolerance.draft_entry_path(self.config)
        found, wanted, limits = [], [], []
        for r in self.recordings:
            given: Any = {"features": torch.from_numpy(r.given)[None]}
            ids, start = torch.from_numpy(r.tokens)[None], torch.zeros(1, dtype=torch.int64)
            hidden, shared = entry.shared(ids, start, **given)
            free, own = exact.shared(ids, start, **given)
            found.append(torch.from_numpy(r.hidden[-1]))
            wanted.append(hidden)
            # Where the two summands cancel, their errors do not.
            size = torch.stack(
                [one.norm(dim=-1).broadcast_to(hidden.shape[:-1]) for one in entry.summands(ids, **given)]
            )
            limits.append(tolerance.CONFIDENCE * path.error(self.precision) * size.norm(dim=0))
            self.shared.append(shared | {"hidden": found[-1]})
            self.free.append(own | {"hidden": free})
        carried = max(relative(f, one["hidden"]) for f, one in zip(found, self.free, strict=True))
        return judge("entry", found, wanted, limits, path.derivation(self.precision)).also(carried=carried)
