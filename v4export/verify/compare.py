"""Compares recordings of a graph with the PyTorch definition, boundary by boundary.

Each layer of the reference is fed what the graph itself handed to that layer, so a difference was caused there and has
its own limit; if every layer is right by itself, so is the whole. What is chosen, experts and what an indexer selects,
is compared by itself; the numbers are those of the graph's choice. A second, free-running reference that only ever sees
its own values shows how differences add up, and what quantised weights cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from v4export.checkpoint.audit import Weight
from v4export.config import ModelConfig
from v4export.model.block import STATE, Block, BlockOutput, Embed, Head, block_shares, head_reads
from v4export.model.inputs import set_input_scales
from v4export.model.load import fill
from v4export.model.moe import MixtureOfExperts
from v4export.model.reasoning import ThinkingHead
from v4export.precision import Precision
from v4export.state_contract import StateTensor, may_skip_decoder, state_tensors
from v4export.verify import tolerance
from v4export.verify.boundary import Boundary, judge, relative, shown
from v4export.verify.halves import Allowed, Errors, Watch, allowed, block_paths, enlarged
from v4export.verify.looked_up import EngramReference
from v4export.verify.narrow_rows import as_read, judge_rows, new_rows
from v4export.verify.recording import Recording
from v4export.verify.rounded import as_the_graph_holds, is_converted
from v4export.verify.routing import Choices, compare_choices
from v4export.verify.selection import IndexErrors, compare_candidates, compare_selections
from v4export.verify.thoughts import ThoughtComparison, thought_boundaries


def expected_boundaries(config: ModelConfig) -> int:
    """How many boundaries a verification has: weights, embedding, logits; of each layer its output and its state.

    Where there are any, also of each layer what was looked up for it, shares of the streams, and what is thought; and
    what is left by tokens that do not pass a decoder.
    """
    shares = config.num_layers if config.hyper and config.hyper.single_pass else 0
    looked_up = sum(config.has_engram(layer) for layer in range(config.num_layers))
    return (
        3
        + may_skip_decoder(config)
        + shares
        + looked_up
        + thought_boundaries(config)
        + sum(1 + len(state_tensors(config, i)) for i in range(config.num_layers))
        # What is handed over, the layer's entry, what leaves it, its state, and as much as of a model's end.
        + (config.drafts and 5 + len(state_tensors(config, config.num_layers)))
    )


def compare(
    weights: dict[str, Weight],
    config: ModelConfig,
    precision: Precision,
    recordings: Sequence[Recording],
    advance: Callable[[Boundary], None] = lambda _: None,
    token_map: np.ndarray | None = None,
    scales: Mapping[str, np.ndarray] | None = None,
) -> list[Boundary]:
    """All boundaries in order; one layer's weights are in memory at a time.

    Engram needs the tokenizer's map; a recipe that rounds what matrices multiply, the scales that it does so by.
    """
    made = (weights, config, precision, recordings, token_map, scales)
    return compared(lambda: Comparison(*made), advance)


def compared(make: Callable[[], Comparison], advance: Callable[[Boundary], None]) -> list[Boundary]:
    """All boundaries of a comparison, of each of which ``advance`` is told."""
    with torch.inference_mode():
        boundaries = []
        for boundary in make().run():
            advance(boundary)
            boundaries.append(boundary)
        return boundaries


class _Seen(NamedTuple):
    """What the reference makes of one layer of one recording, and how far the graph is from it.

    Attributes:
        hidden: [n, D] or [n, X, D].
        rows: that can still be seen, of each state tensor by name.
        pre: shares of the streams in the next layer's input, [n, X], where single-pass.
        allowed: how far the graph may be off.
        choices: of experts, and of what an indexer selects.
        lost: relative difference that converting the weights causes.
        carried: relative difference to the free-running reference.
    """

    hidden: torch.Tensor
    rows: dict[str, torch.Tensor]
    pre: torch.Tensor | None
    allowed: Allowed
    choices: tuple[Choices, ...]
    lost: float
    carried: float


class Comparison:
    """What ``compare`` has, and its references of each layer in turn."""

    def __init__(
        self,
        weights: dict[str, Weight],
        config: ModelConfig,
        precision: Precision,
        recordings: Sequence[Recording],
        token_map: np.ndarray | None = None,
        scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        #: The definition is run without rounding what it keeps, over rows that the graph has rounded.
        self.config, self.kept, self.precision = replace(config, state_fp8=False), config, precision
        self.recorded, self.recordings = recordings, [as_read(r, config, precision) for r in recordings]
        self.exact = lambda name: torch.from_numpy(weights[name].decode())
        self.held = lambda name: torch.from_numpy(as_the_graph_holds(weights[name], precision))
        self.engram = None if token_map is None else EngramReference(config, weights, precision, token_map)
        self.scales = scales or {}
        self.converted = any(is_converted(w, precision) for w in weights.values())
        #: What blocks read, one for each recording: as the graph has it, and as the free-running reference has it.
        self.shared: list[dict[str, torch.Tensor]] = []
        self.free: list[dict[str, torch.Tensor]] = []

    def run(self) -> Iterator[Boundary]:
        """Boundaries, one after another."""
        yield self._embedding()
        for layer in range(self.config.num_layers):
            yield from self._layer(layer)
        yield from self._head()
        if self.config.thinks:
            heads = self._pair(lambda: ThinkingHead(self.config, absorbed=False))
            given = (self.config, self.precision, self.recordings, heads, self.shared, self.free)
            yield from ThoughtComparison(*given, kept=self.kept, recorded=self.recorded).run()

    def _embedding(self) -> Boundary:
        embed, exact = self._pair(lambda: Embed(self.config))
        found, wanted, wrong = [], [], []
        for i, r in enumerate(self.recordings):
            # Tokens ahead of them have not passed the decoder.
            ids, start = torch.from_numpy(r.tokens)[None], torch.tensor([len(r.before)])
            hidden, shared = embed.shared(ids, start, start)
            wanted.append(hidden)
            found.append(torch.from_numpy(r.hidden[-1]))
            # A norm behind them hides a factor of all shares.
            if "pre" in shared and not torch.equal(torch.from_numpy(r.pre[-1]), shared["pre"]):
                wrong.append(f"sequence {i}: the streams' shares in the first layer's input are others")
            self.shared.append(shared | {"hidden": found[-1]})
            free, shared = exact.shared(ids, start, start)
            self.free.append(shared | {"hidden": free})
        # A look-up computes nothing: not a bit may differ.
        none = [w.norm(dim=-1) * 0 for w in wanted]
        return judge("embedding", found, wanted, none, "exact: a look-up").also(wrong=shown(wrong))

    def _layer(self, layer: int) -> Iterator[Boundary]:
        c, p = self.config, self.precision
        if c.has_engram(layer):
            yield self._looked_up(layer)
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
            load=self._load(layer),
            selective=(selective, sum(len(s.hidden) for s in seen)) if selective else None,
            wrong=shown([f"sequence {i}, {line}" for i, one in choices for line in one.wrong]),
        )
        shares = [s.pre for s in seen if s.pre is not None]
        if shares:
            limits = [s.allowed.pre * pre.norm(dim=-1) for s, pre in zip(seen, shares, strict=True)]
            found = [torch.from_numpy(r.pre[layer]) for r in self.recordings]
            yield judge(f"layer {layer} shares of streams", found, shares, limits, "as the coefficients of the layer")
        for tensor in state_tensors(self.kept, layer):
            if tensor.name == tensor.rows:
                yield from self._rows(layer, tensor, seen)

    def _looked_up(self, layer: int) -> Boundary:
        """What the graph was given of an Engram table: not a bit may differ from the checkpoint's rows."""
        assert self.engram is not None
        found, wanted = [], []
        for r in self.recordings:
            found.append(torch.from_numpy(r.engram[layer]).float())
            wanted.append(torch.from_numpy(self.engram.rows(layer, r.before, r.tokens)).float())
        none = [w.norm(dim=-1) * 0 for w in wanted]
        return judge(f"layer {layer} engram rows", found, wanted, none, "exact: a look-up")

    def _rows(self, layer: int, tensor: StateTensor, seen: Sequence[_Seen]) -> Iterator[Boundary]:
        """The rows of one state tensor."""
        path = tolerance.row_path(self.config, layer, tensor.name)
        wanted = [s.rows[tensor.name] for s in seen]
        relative = [self._with_input(path, s.allowed) for s in seen]
        called = f"layer {layer} {self._called(layer, tensor.name)}"
        yield from judge_rows(called, self.recorded, tensor, layer, wanted, relative, path.derivation(self.precision))

    def _with_input(self, path: tolerance.Path, limits: Allowed) -> float:
        """What is allowed relative to a path's output where the attention's input is not exact.

        What comes out may stand for many tokens: it is held to the least exact of any.
        """
        own = tolerance.CONFIDENCE * path.error(self.precision)
        given = enlarged(limits.attention_input.max(), path.roundings(self.precision))
        return float(given.hypot(torch.tensor(own)))

    def _called(self, layer: int, name: str) -> str:
        """A state tensor in the report: beside the kind of its layer, where there are several."""
        if self.config.compressed is None:
            return name
        return f"{self.config.compressed.layers[layer]} {'keys' if name == 'window' else name}"

    def _one(self, block: Block, exact: Block, layer: int, i: int, errors: Errors) -> _Seen:
        """One layer of one recording: fed by the graph, and free-running."""
        r, c = self.recordings[i], self.config
        shared, free = self.shared[i], self.free[i]
        x, pre = shared["hidden"], shared.get("pre")
        if c.has_engram(layer):
            for one in (shared, free):
                one["engram"] = torch.from_numpy(r.engram[layer])[None]
        choice = (r.experts.get(layer), r.selected.get(layer))
        taken, selected = (None if one is None else torch.from_numpy(one) for one in choice)

        held = {t.name: torch.from_numpy(r.held[layer, t.name])[None] for t in state_tensors(c, layer)}

        rounded = new_rows(r, self.kept, layer)

        def step(one: Block, given: dict[str, torch.Tensor], rows: dict[str, torch.Tensor]) -> BlockOutput:
            """All tokens at once over what was held before them: neither chunks nor decode, nor absorbed attention."""
            return one(given["hidden"], given, held, taken, selected, rows)

        with Watch(block) as watch:
            out = step(block, shared, rounded)
        limits = allowed(block, x, watch, errors, pre)
        choices = []
        if taken is not None:
            assert isinstance(block.mlp, MixtureOfExperts)
            # The router multiplies what is not rounded to E4M3.
            own = tolerance.CONFIDENCE * tolerance.feed_forward_path(c, layer).unrounded(self.precision)
            error = limits.router_input + own
            ids = torch.from_numpy(r.tokens)
            choices.append(compare_choices(block.mlp.gate, c, watch.router_input, taken, error, ids))
        if selected is not None and watch.index is not None:
            of_index = self._index_errors(layer, limits)
            choices.append(compare_selections(watch.index, selected, of_index))
            if layer in r.candidates:
                kept = torch.from_numpy(r.candidates[layer])
                choices.append(compare_candidates(watch.index, kept, of_index))
        lost = relative(out.hidden, step(exact, shared, rounded).hidden) if self.converted else 0.0
        ran = step(exact, free, {})
        self._share(layer, free, ran.named(), held)
        self._share(layer, shared, self._recorded(layer, r, out), held)
        carried = relative(shared["hidden"], free["hidden"])
        rows = {t.name: _visible(t, out.rows[t.name][0], r) for t in state_tensors(c, layer)}
        return _Seen(out.hidden, rows, out.pre, limits, tuple(choices), lost, carried)

    def _share(
        self,
        layer: int,
        shared: dict[str, torch.Tensor],
        named: dict[str, torch.Tensor],
        state: dict[str, torch.Tensor],
    ) -> None:
        """Let later layers have what a layer shares."""
        named = named | {STATE + name: value for name, value in state.items()}
        shared |= {name: named[own] for name, own in block_shares(self.config, layer).items()}

    def _recorded(self, layer: int, r: Recording, out: BlockOutput) -> dict[str, torch.Tensor]:
        """What the graph itself returned from a layer; what nobody reads of it, as the reference has it.

        An entry that is not complete is seen by no token, and is not recorded.
        """
        fields = {"hidden": r.hidden, "selected": r.selected, "candidates": r.candidates, "pre": r.pre}
        found = {name: torch.from_numpy(by_layer[layer]) for name, by_layer in fields.items() if layer in by_layer}
        for name in set(block_shares(self.config, layer).values()) & out.rows.keys():
            rows, new = r.state[layer, name][len(r.held[layer, name]) :], out.rows[name]
            found[name] = torch.nn.functional.pad(torch.from_numpy(rows)[None], (0, 0, 0, new.shape[1] - len(rows)))
        return found

    def _index_errors(self, layer: int, limits: Allowed) -> IndexErrors:
        """Of keys that another layer made, or that are rounded, the reference has the graph's own."""
        makes_keys = any(t.name == "index_key" for t in state_tensors(self.config, layer)) and not self.kept.state_fp8
        return IndexErrors(
            self._with_input(tolerance.index_query_path(self.config), limits),
            self._with_input(tolerance.row_path(self.config, layer, "index_key"), limits) if makes_keys else 0.0,
            self._with_input(tolerance.index_weight_path(self.config), limits),
        )

    def _load(self, layer: int) -> tuple[int, ...]:
        if not self.config.is_moe(layer):
            return ()
        chosen = np.concatenate([r.experts[layer].ravel() for r in self.recordings])
        return tuple(np.bincount(chosen, minlength=self.config.num_experts).tolist())

    def _head(self) -> Iterator[Boundary]:
        c = self.config
        head, exact = self._pair(lambda: Head(c))
        path = tolerance.head_path(c)
        found, wanted, carried = [], [], []
        for r, shared, free in zip(self.recordings, self.shared, self.free, strict=True):
            at = {"logits_at": torch.arange(len(r.tokens))[None]}
            given, ran = ([one[name] for name in head_reads(c)] for one in (shared | at, free | at))
            wanted.append(head(*given)[0][0])
            found.append(torch.from_numpy(r.logits))
            carried.append(relative(found[-1], exact(*ran)[0][0]))
        limits = [tolerance.CONFIDENCE * path.error(self.precision) * w.norm(dim=-1) for w in wanted]
        yield judge("logits", found, wanted, limits, path.derivation(self.precision)).also(carried=max(carried))
        if c.drafts:
            yield self._features(head)

    def _features(self, head: Head) -> Boundary:
        """What a layer that drafts is handed."""
        path = tolerance.features_path(self.config)
        wanted = [head.features(shared["hidden"]) for shared in self.shared]
        found = [torch.from_numpy(r.features) for r in self.recordings if r.features is not None]
        error = tolerance.CONFIDENCE * path.error(self.precision)
        derivation = path.derivation(self.precision) if path.name else "exact: the last layer's streams"
        return judge("features", found, wanted, [error * w.norm(dim=-1) for w in wanted], derivation)

    def _pair(self, make: Callable[[], torch.nn.Module], layer: int | None = None) -> tuple[Any, Any]:
        """The part as the graph holds its weights and rounds its inputs, and as the checkpoint has it."""
        held = make()
        fill(held, self.config, self.held, layer)
        set_input_scales(held, self.scales, layer, self.config)
        if not self.converted:
            return held, held
        exact = make()
        fill(exact, self.config, self.exact, layer)
        return held, exact


def _visible(tensor: StateTensor, new: torch.Tensor, recording: Recording) -> torch.Tensor:
    """Of the new rows of a recording's tokens, those that can still be seen at its end."""
    start = len(recording.before)
    first, complete = tensor.complete(start), tensor.complete(start + len(recording.tokens))
    return new[max(first, complete - (tensor.ring or complete)) - first : complete - first]
