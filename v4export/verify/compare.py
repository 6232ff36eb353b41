"""Compares recordings of a graph with the PyTorch definition, boundary by boundary.

Each layer of the reference is fed what the graph itself handed to that layer, so a difference was caused there and has
its own limit; if every layer is right by itself, so is the whole. What is chosen, experts and what an indexer selects,
is compared by itself; the numbers are those of the graph's choice. A second, free-running reference that only ever sees
its own values shows how differences add up, and what quantised weights cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.model.block import Block, BlockOutput, Embed, Head
from v4export.model.load import fill
from v4export.model.moe import MixtureOfExperts
from v4export.model.transformer import empty_state
from v4export.precision import Precision
from v4export.state_contract import StateTensor, state_tensors
from v4export.verify import tolerance
from v4export.verify.boundary import Boundary, judge, shown
from v4export.verify.halves import Allowed, Errors, Watch, allowed, block_paths
from v4export.verify.recording import Recording
from v4export.verify.rounded import as_the_graph_holds, is_converted
from v4export.verify.routing import Choices, compare_choices
from v4export.verify.selection import IndexErrors, compare_selections


def expected_boundaries(config: ModelConfig) -> int:
    """How many boundaries a verification has: weights, embedding, logits; of each layer its output and its state."""
    return 3 + sum(1 + len(state_tensors(config, layer)) for layer in range(config.num_layers))


def compare(
    weights: dict[str, Weight],
    config: ModelConfig,
    precision: Precision,
    recordings: Sequence[Recording],
    advance: Callable[[Boundary], None] = lambda _: None,
) -> list[Boundary]:
    """All boundaries in order; one layer's weights are in memory at a time."""
    with torch.inference_mode():
        comparison = _Comparison(weights, config, precision, recordings)
        boundaries = []
        for boundary in comparison.run():
            advance(boundary)
            boundaries.append(boundary)
        return boundaries


class _Seen(NamedTuple):
    """What the reference makes of one layer of one recording, and how far the graph is from it.

    Attributes:
        hidden: [n, D] or [n, X, D].
        rows: that can still be seen, of each state tensor by name.
        allowed: how far the graph may be off.
        choices: of experts, and of what an indexer selects.
        lost: relative difference that converting the weights causes.
        carried: relative difference to the free-running reference.
    """

    hidden: torch.Tensor
    rows: dict[str, torch.Tensor]
    allowed: Allowed
    choices: tuple[Choices, ...]
    lost: float
    carried: float


class _Comparison:
    def __init__(
        self, weights: dict[str, Weight], config: ModelConfig, precision: Precision, recordings: Sequence[Recording]
    ) -> None:
        self.config, self.precision, self.recordings = config, precision, recordings
        self.exact = lambda name: torch.from_numpy(weights[name].decode())
        self.held = lambda name: torch.from_numpy(as_the_graph_holds(weights[name], precision))
        self.converted = any(is_converted(w, precision) for w in weights.values())
        #: Hidden states of the free-running reference, and what all its blocks read, one for each recording.
        self.free: list[torch.Tensor] = []
        self.shared: list[dict[str, torch.Tensor]] = []

    def run(self) -> Iterator[Boundary]:
        """Boundaries, one after another."""
        yield self._embedding()
        for layer in range(self.config.num_layers):
            yield from self._layer(layer)
        yield self._head()

    def _embedding(self) -> Boundary:
        embed, exact = self._pair(lambda: Embed(self.config))
        found, wanted = [], []
        for r in self.recordings:
            ids, start = torch.from_numpy(r.tokens)[None], torch.zeros(1, dtype=torch.int64)
            hidden, shared = embed.shared(ids, start)
            wanted.append(hidden)
            found.append(torch.from_numpy(r.hidden[-1]))
            self.free.append(exact.shared(ids, start)[0])
            self.shared.append(shared)
        # A look-up computes nothing: not a bit may differ.
        return judge("embedding", found, wanted, [w.norm(dim=-1) * 0 for w in wanted], "exact: a look-up")

    def _layer(self, layer: int) -> Iterator[Boundary]:
        c, p = self.config, self.precision
        block, exact = self._pair(lambda: Block(c, layer, absorbed=False), layer)
        paths = block_paths(c, layer, max(len(r.tokens) for r in self.recordings))
        errors = Errors.of(paths, p)
        seen = [self._one(block, exact, layer, i, errors) for i in range(len(self.recordings))]
        found = [torch.from_numpy(r.hidden[layer]) for r in self.recordings]
        limits = [s.allowed.hidden for s in seen]
        derivation = "; ".join(path.derivation(p) for path in paths if path.name)
        choices = [(i, one) for i, s in enumerate(seen) for one in s.choices]
        selective = sum(one.selective for _, one in choices)
        yield judge(f"layer {layer} {c.kind(layer)}", found, [s.hidden for s in seen], limits, derivation).also(
            carried=max(s.carried for s in seen),
            weights=max(s.lost for s in seen) if self.converted else None,
            ties=sum(one.ties for _, one in choices),
            evidence=shown([f"sequence {i}, {line}" for i, one in choices for line in one.evidence]),
            experts=self._experts(layer),
            selective=(selective, sum(len(s.hidden) for s in seen)) if selective else None,
            wrong=shown([f"sequence {i}, {line}" for i, one in choices for line in one.wrong]),
        )
        for tensor in state_tensors(c, layer):
            yield self._rows(layer, tensor.name, seen)

    def _rows(self, layer: int, name: str, seen: Sequence[_Seen]) -> Boundary:
        """The rows of one state tensor that can still be seen at the end."""
        path = tolerance.row_path(self.config, layer, name)
        found = [torch.from_numpy(r.state[layer, name]) for r in self.recordings]
        wanted = [s.rows[name] for s in seen]
        limits = [self._with_input(path, s.allowed) * s.rows[name].norm(dim=-1) for s in seen]
        called = f"layer {layer} {self._called(layer, name)}"
        return judge(called, found, wanted, limits, path.derivation(self.precision))

    def _with_input(self, path: tolerance.Path, limits: Allowed) -> float:
        """What is allowed relative to a path's output where the attention's input is not exact.

        What comes out may stand for many tokens: it is held to the least exact of any.
        """
        own = tolerance.CONFIDENCE * path.error(self.precision)
        return float(limits.attention_input.max().hypot(torch.tensor(own)))

    def _called(self, layer: int, name: str) -> str:
        """A state tensor in the report: beside the kind of its layer, where there are several."""
        if self.config.compressed is None:
            return name
        return f"{self.config.compressed.layers[layer]} {'keys' if name == 'window' else name}"

    def _one(self, block: Block, exact: Block, layer: int, i: int, errors: Errors) -> _Seen:
        """One layer of one recording: fed by the graph, and free-running."""
        r, c = self.recordings[i], self.config
        x = torch.from_numpy(r.hidden[layer - 1])
        choice = (r.experts.get(layer), r.selected.get(layer))
        taken, selected = (None if one is None else torch.from_numpy(one) for one in choice)

        def step(one: Block, x: torch.Tensor) -> BlockOutput:
            """The whole sequence at once over an empty state: neither chunks nor decode, nor absorbed attention."""
            return one(x, self.shared[i], empty_state(c, layer, torch.float32), taken, selected)

        with Watch(block) as watch:
            out = step(block, x)
        limits = allowed(block, x, watch, errors)
        choices = []
        if taken is not None:
            assert isinstance(block.mlp, MixtureOfExperts)
            relative = limits.router_input + errors.feed_forward
            ids = torch.from_numpy(r.tokens)
            choices.append(compare_choices(block.mlp.gate, c, watch.router_input, taken, relative, ids))
        if selected is not None and watch.index is not None:
            choices.append(compare_selections(watch.index, selected, self._index_errors(layer, limits)))
        lost = _relative(out.hidden, step(exact, x).hidden) if self.converted else 0.0
        self.free[i] = step(exact, self.free[i]).hidden
        carried = _relative(torch.from_numpy(r.hidden[layer]), self.free[i])
        new = zip(state_tensors(c, layer), out.rows, strict=True)
        rows = {tensor.name: _visible(tensor, every[0], len(r.tokens)) for tensor, every in new}
        return _Seen(out.hidden, rows, limits, tuple(choices), lost, carried)

    def _index_errors(self, layer: int, limits: Allowed) -> IndexErrors:
        paths = (
            tolerance.index_query_path(self.config),
            tolerance.row_path(self.config, layer, "index_key"),
            tolerance.index_weight_path(self.config),
        )
        return IndexErrors(*(self._with_input(path, limits) for path in paths))

    def _experts(self, layer: int) -> tuple[int, int] | None:
        if not self.config.is_moe(layer):
            return None
        taken = np.unique(np.concatenate([r.experts[layer].ravel() for r in self.recordings]))
        return len(taken), self.config.num_experts

    def _head(self) -> Boundary:
        head, exact = self._pair(lambda: Head(self.config))
        path = tolerance.head_path(self.config)
        found, wanted, carried = [], [], []
        for r, free in zip(self.recordings, self.free, strict=True):
            at = torch.arange(len(r.tokens))[None]
            wanted.append(head(torch.from_numpy(r.hidden[self.config.num_layers - 1]), at)[0])
            found.append(torch.from_numpy(r.logits))
            carried.append(_relative(found[-1], exact(free, at)[0]))
        limits = [tolerance.CONFIDENCE * path.error(self.precision) * w.norm(dim=-1) for w in wanted]
        return judge("logits", found, wanted, limits, path.derivation(self.precision)).also(carried=max(carried))

    def _pair(self, make: Callable[[], torch.nn.Module], layer: int | None = None) -> tuple[Any, Any]:
        """The part with the weights as the graph holds them, and as the checkpoint has them."""
        held = make()
        fill(held, self.config, self.held, layer)
        if not self.converted:
            return held, held
        exact = make()
        fill(exact, self.config, self.exact, layer)
        return held, exact


def _visible(tensor: StateTensor, new: torch.Tensor, tokens: int) -> torch.Tensor:
    """Of all rows of a sequence that began with nothing, those that can still be seen at its end."""
    complete = tensor.complete(tokens)
    return new[max(0, complete - (tensor.ring or complete)) : complete]


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
