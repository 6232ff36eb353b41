"""All recipes side by side through the model, one layer's weights in memory at a time.

A layer's weights are read once, for the float32 reference; each recipe rounds them from there. Every recipe passes a
layer twice: with what the reference handed to it, which shows what rounding in this layer does, and with what its own
layers before it made, which is how it would run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from v4export.evaluate.lane import Lane, in_types_of, values_of
from v4export.evaluate.results import DIVERGENCE, NLL, PROBABILITY, REFERENCE_NLL, SAME, LayerError
from v4export.evaluate.store import Store
from v4export.model.block import Head, head_reads
from v4export.model.load import Lookup


class Stream:
    """The reference and some recipes.

    Args:
        reference: in float32.
        lanes: the recipes.
        batches: windows, int64 [B, S] each.
        store: keeps hidden states.
        advance: told each time that a lane has passed a layer or the head.
    """

    def __init__(
        self,
        reference: Lane,
        lanes: Sequence[Lane],
        batches: Sequence[np.ndarray],
        store: Store,
        advance: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.reference, self.lanes, self.batches = reference, lanes, batches
        self.store, self.advance = store, advance

    def layers(self) -> dict[str, list[LayerError]]:
        """Run every layer; the errors of each lane. The last hidden states stay in the store."""
        self._embed()
        found: dict[str, list[LayerError]] = {lane.name: [] for lane in self.lanes}
        config = self.reference.config
        for layer in range(config.num_layers):
            block = self.reference.block(layer, decoded(self.reference))
            for i, ids in enumerate(self.batches):
                self.store["next", i] = self.reference.step(block, layer, ids, self.store[self.reference.name, i])
            self.advance(1)
            values = values_of(block, config, layer)
            for lane in self.lanes:
                own = lane.block(layer, values)
                errors = _Errors(), _Errors()
                for i, ids in enumerate(self.batches):
                    wanted = self.store["next", i]["hidden"]
                    mine = self.store[lane.name, i]
                    self.store[lane.name, i] = alone = ran = lane.step(own, layer, ids, mine)
                    if layer:  # the first is fed the same by both
                        given = in_types_of(mine, self.store[self.reference.name, i])
                        alone = lane.step(own, layer, ids, given)
                    for error, made in zip(errors, (alone, ran), strict=True):
                        error.add(made["hidden"], wanted)
                found[lane.name].append(LayerError(layer, config.kind(layer), *(e.value for e in errors)))
                self.advance(1)
            for i in range(len(self.batches)):
                self.store[self.reference.name, i] = self.store["next", i]
        return found

    def predictions(self, chunk: int) -> dict[str, np.ndarray]:
        """Of each lane and the reference, what is kept of every scored token, [N, 5]; ``chunk`` tokens at a time."""
        groups: dict[object, list[Lane]] = defaultdict(list)
        for lane in (self.reference, *self.lanes):
            groups[lane.head_key].append(lane)
        exact = self.reference.head(decoded(self.reference))
        values = values_of(exact, self.reference.config)
        kept: dict[str, list[np.ndarray]] = defaultdict(list)
        for lanes in groups.values():
            head = lanes[0].head(values)
            for i, ids in enumerate(self.batches):
                for at in scored(ids).split(chunk):
                    wanted = log_probabilities(exact, self.store[self.reference.name, i], at)
                    following = torch.from_numpy(ids).flatten()[at + 1]
                    for lane in lanes:
                        same = wanted if lane is self.reference else None
                        found = log_probabilities(head, self.store[lane.name, i], at) if same is None else same
                        kept[lane.name].append(compared(wanted, found, following))
            for _ in lanes:
                self.advance(1)
        return {name: np.concatenate(pieces) for name, pieces in kept.items()}

    def _embed(self) -> None:
        exact = self.reference.embedding(decoded(self.reference))
        values = values_of(exact, self.reference.config)
        for lane in (self.reference, *self.lanes):
            part = exact if lane is self.reference else lane.embedding(values)
            for i, ids in enumerate(self.batches):
                hidden, shared = part.shared(torch.from_numpy(ids), torch.zeros(len(ids), dtype=torch.int64))
                self.store[lane.name, i] = shared | {"hidden": hidden}


def decoded(reference: Lane) -> Lookup:
    """The checkpoint's own values, from its files."""
    return lambda name: torch.from_numpy(reference.weights[name].decode())


def scored(ids_BS: np.ndarray) -> torch.Tensor:
    """Which of a batch's tokens predict one, int64: all but the last of each window."""
    B, S = ids_BS.shape
    return torch.arange(B * S).reshape(B, S)[:, :-1].flatten()


def log_probabilities(head: Head, given: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Predictions of tokens by their place in a batch, float64 [n, V]."""
    every = {"logits_at": torch.arange(len(at))[None]}
    logits, *_ = head(*(every[name] if name in every else given[name][at] for name in head_reads(head.config)))
    return logits[0].double().log_softmax(-1)


def compared(wanted: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> np.ndarray:
    """What is kept of each token, [n, 5].

    Args:
        wanted: log-probabilities by the reference, float64 [n, V].
        found: by a recipe.
        following: the text's tokens, int64 [n].
    """
    right, own = (one.gather(1, following[:, None])[:, 0] for one in (wanted, found))
    # A probability of zero adds nothing, whatever its logarithm is.
    each = torch.where(wanted == -math.inf, 0.0, wanted.exp() * (wanted - found))
    out = np.empty((len(following), 5))
    out[:, REFERENCE_NLL], out[:, NLL] = -right, -own
    out[:, DIVERGENCE] = each.sum(1)
    out[:, SAME] = wanted.argmax(1) == found.argmax(1)
    out[:, PROBABILITY] = own.exp() - right.exp()
    return out


class _Errors:
    """Root mean square over tokens of relative differences."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """Hidden states of some tokens, [M, D] or [M, X, D]."""
        a, b = found.flatten(1).double(), wanted.flatten(1).double()
        relative_M = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-30)
        self.total += float(relative_M.square().sum())
        self.tokens += len(relative_M)

    @property
    def value(self) -> float:
        """Of all tokens so far."""
        return math.sqrt(self.total / self.tokens)
