"""Compares a graph's thoughts with the PyTorch definition: what they start from, each layer of each step, their end.

Each layer of each step is fed what the graph itself had there, and each step the token that the graph let enter; which
token that should have been is compared by itself. Both forms of graph are held to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from v4export.config import ModelConfig
from v4export.model.block import Block, head_reads
from v4export.model.linear import Linear, activations_of
from v4export.model.reasoning import ThinkingHead
from v4export.precision import Precision
from v4export.state_contract import state_tensors
from v4export.verify import tolerance
from v4export.verify.boundary import Boundary, judge, relative, shown
from v4export.verify.halves import Errors, Watch, allowed, block_paths
from v4export.verify.narrow_rows import judge_rows
from v4export.verify.recording import Recording, Thinking
from v4export.verify.routing import Choices

_SMALLEST = 1e-30


def thought_boundaries(config: ModelConfig) -> int:
    """How many boundaries thoughts have: start and each layer's rows; in each form layers, tokens, weight, logits."""
    if config.reasoning is None or not config.thinks:
        return 0
    rows = sum(len(state_tensors(config, layer)) for layer in range(config.num_layers, config.state_layers))
    return 1 + rows + 2 * (config.reasoning.layers + 3)


@dataclass(frozen=True)
class _One:
    """Thoughts about one sequence, in one form.

    Attributes:
        name: of the sequence.
        trunk: what they start from, [n, D].
        at: positions of the tokens they are about, int64 [1, n].
        rows: of the sequence, by layer, [1, T, W].
        thinking: what the graph made of them.
    """

    name: str
    trunk: torch.Tensor
    at: torch.Tensor
    rows: list[torch.Tensor]
    thinking: Thinking

    def hidden(self, k: int, j: int) -> torch.Tensor:
        """After a layer of a step, [n, D]."""
        return torch.from_numpy(self.thinking.hidden[k, j])

    def before(self, k: int) -> torch.Tensor:
        """What the step before one left, [n, D]."""
        return self.hidden(k - 1, len(self.rows) - 1) if k > 1 else self.trunk


class ThoughtComparison:
    """Thoughts of all recordings.

    Args:
        config: the model.
        precision: of the graph.
        recordings: with thoughts.
        heads: the reference, with the weights as the graph holds them, and as the checkpoint has them.
        shared: of each recording, what the graph handed to its head.
        free: the same of the free-running reference.
        kept: the model with what it keeps as the graph does, of which the definition rounds nothing.
        recorded: the recordings with rows as the graph keeps them.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        recordings: Sequence[Recording],
        heads: tuple[ThinkingHead, ThinkingHead],
        shared: Sequence[Mapping[str, torch.Tensor]],
        free: Sequence[Mapping[str, torch.Tensor]],
        *,
        kept: ModelConfig,
        recorded: Sequence[Recording],
    ) -> None:
        self.kept, self.recorded = kept, recorded
        self.config, self.precision, self.recordings = config, precision, recordings
        (self.head, self.exact), self.shared = heads, shared
        self.layers = range(config.num_layers, config.state_layers)
        self.norm = tolerance.Path("norm", 1, config.hidden_size, 0)
        self.rows = [self.head.rows(*self._last(one, r)) for one, r in zip(shared, recordings, strict=True)]
        self.lengths_V = self.head.lm_head.matrix().float().norm(dim=-1)
        self.free = [self._free(one, r) for one, r in zip(free, recordings, strict=True)]

    def run(self) -> Iterator[Boundary]:
        """Boundaries, one after another."""
        yield self._start()
        for layer in self.layers:
            yield from self._rows(layer)
        # Each form by itself: a defect of one alone would be diluted in the mean of both.
        for looped in (False, True):
            thoughts = [self._one(i, r, looped) for i, r in enumerate(self.recordings)]
            form = ", looped" if looped else ""
            for j in range(len(self.layers)):
                yield self._layer(f"reasoning {j}{form}", thoughts, j)
            yield self._tokens(f"thought tokens{form}", thoughts)
            yield self._weight(f"thought weight{form}", thoughts)
            yield self._logits(f"thought logits{form}", thoughts)

    def _one(self, i: int, r: Recording, looped: bool) -> _One:
        assert r.trunk is not None
        rows = [torch.from_numpy(r.state[layer, "latent"])[None] for layer in self.layers]
        trunk, at = torch.from_numpy(r.trunk), len(r.before) + torch.arange(len(r.tokens))[None]
        (thinking,) = [one for one in r.thinking if one.looped == looped]
        return _One(f"sequence {i}", trunk, at, rows, thinking)

    def _collapsed(self, head: ThinkingHead, shared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return head.collapsed(*(shared[name] for name in head_reads(self.config) if name != "logits_at"))

    def _start(self) -> Boundary:
        """What thoughts start from: hidden states as they are, or with the streams collapsed."""
        paths = [p for p in tolerance.hyper_paths(self.config)[:2] if p.name]
        wanted = [self._collapsed(self.head, shared) for shared in self.shared]
        found = [torch.from_numpy(r.trunk) for r in self.recordings if r.trunk is not None]
        limits = [tolerance.CONFIDENCE * self._error(paths) * w.norm(dim=-1) for w in wanted]
        derivation = "; ".join(p.derivation(self.precision) for p in paths) or "exact: the last layer's hidden states"
        return judge("thought start", found, wanted, limits, derivation)

    def _rows(self, layer: int) -> Iterator[Boundary]:
        """What one layer keeps of every token."""
        j, (tensor, *_) = layer - self.config.num_layers, state_tensors(self.kept, layer)
        path = tolerance.row_path(self.config.thinker, j, tensor.name)
        error = tolerance.CONFIDENCE * self._error([path, *tolerance.hyper_paths(self.config)[:2]])
        wanted = [rows[j][tensor.name][0] for rows in self.rows]
        relative, derivation = [error] * len(wanted), path.derivation(self.precision)
        yield from judge_rows(f"reasoning {j} latent", self.recorded, tensor, layer, wanted, relative, derivation)

    def _layer(self, name: str, thoughts: Sequence[_One], j: int) -> Boundary:
        """One layer in every step."""
        c, p = self.config.thinker, self.precision
        block: Block = self.head.reasoning.layers[j]  # type: ignore[assignment]
        longest = max(len(r.before) + len(r.tokens) for r in self.recordings)
        paths = block_paths(c, j, longest + self.head.steps)
        errors = Errors.of(paths, p)
        found, wanted, limits = [], [], []
        for one in thoughts:
            own: dict[str, torch.Tensor] = {}
            for k in range(1, self.head.steps + 1):
                x = self._entered(one, k) if j == 0 else one.hidden(k, j - 1)
                with Watch(block) as watch:
                    out = block(x, self.head.shared(one.at, k), {"latent": one.rows[j], **own})
                own = out.rows
                found.append(one.hidden(k, j))
                wanted.append(out.hidden)
                limits.append(allowed(block, x, watch, errors).hidden)
        derivation = "; ".join(path.derivation(p) for path in paths if path.name)
        return judge(name, found, wanted, limits, derivation)

    def _entered(self, one: _One, k: int) -> torch.Tensor:
        """What enters a step, rounded as the graph stores it."""
        r = self.head.reasoning
        entering: torch.Tensor = r.start_embedding if k == 1 else r.end_embedding
        if 1 < k < self.head.steps:
            entering = self.head.embed_tokens["weight"][torch.from_numpy(one.thinking.tokens[:, k - 2])]
        stored = activations_of(self.precision)
        return (one.before(k) + entering).to(stored).float()

    def _tokens(self, name: str, thoughts: Sequence[_One]) -> Boundary:
        """Which tokens entered: the likeliest, or as good within what rounding explains."""
        path = tolerance.head_path(self.config)
        error = tolerance.CONFIDENCE * path.error(self.precision)
        choices, count = [], 0
        for one in thoughts:
            for k in range(2, self.head.steps):
                taken = torch.from_numpy(one.thinking.tokens[:, k - 2])
                choices.append((f"{one.name}, step {k}", self._choices(one.before(k), taken, error)))
                count += len(taken)
        wrong = [f"{where}, {line}" for where, c in choices for line in c.wrong]
        evidence = [f"{where}, {line}" for where, c in choices for line in c.evidence]
        derivation = f"exact: {count} tokens, each the likeliest; {path.derivation(self.precision)}"
        found = Boundary(name, True, 0.0, 0.0, 0.0, 1.0, derivation)
        return found.also(shown(wrong), ties=sum(c.ties for _, c in choices), evidence=shown(evidence))

    def _choices(self, z_MD: torch.Tensor, taken_M: torch.Tensor, error: float) -> Choices:
        normed = self.head.norm(z_MD)
        logits_MV, wrong, evidence = self.head.logits(normed), [], []
        best_M = logits_MV.argmax(-1)
        for token in (best_M != taken_M).nonzero()[:, 0].tolist():
            best, taken = int(best_M[token]), int(taken_M[token])
            gap = float(logits_MV[token, best] - logits_MV[token, taken])
            size = normed[token].norm() * (self.lengths_V[best] + self.lengths_V[taken])
            slack = error * float(size) / normed.shape[-1] ** 0.5
            line = f"token {token}: thought {taken}, the reference thinks {best}"
            if gap <= slack:
                evidence.append(f"{line}; logits {gap:.2g} apart where rounding explains {slack:.2g}")
            else:
                wrong.append(f"{line}, beyond a near tie by {gap - slack:.2g}")
        return Choices(len(evidence), tuple(wrong), tuple(evidence))

    def _weight(self, name: str, thoughts: Sequence[_One]) -> Boundary:
        """How much of each thought is in its prediction."""
        found, wanted, limits = [], [], []
        for one in thoughts:
            both = torch.cat(self._ends(one), -1)
            found.append(torch.from_numpy(one.thinking.weight)[:, None])
            wanted.append(self.head.reasoning.talk_head(both)[:, None])
            limits.append(self._weight_limit(both))
        return judge(name, found, wanted, limits, self.norm.derivation(self.precision))

    def _weight_limit(self, both_MC: torch.Tensor) -> torch.Tensor:
        """Independent errors of the numbers that go in, of sums, and of what is stored, followed through the talk head.

        A number may go in with an error relative to the size of all of them, since norms multiply by one factor.
        """
        stored = tolerance.Path("", 1, 0, 0).error(self.precision)
        x_MC, variance_MC = both_MC, (self.norm.error(self.precision) * both_MC).square()
        for part in self.head.reasoning.talk_head:
            if isinstance(part, Linear):
                square = part.matrix().float().square()
                summed = tolerance.ACCUMULATE**2 / 3 * square.shape[1] * (x_MC.square() @ square.T)
                x_MC = part(x_MC)
                variance_MC = variance_MC @ square.T + summed + (stored * x_MC).square()
            else:
                x_MC = part(x_MC)
        return tolerance.CONFIDENCE * variance_MC[:, 0].sqrt()

    def _logits(self, name: str, thoughts: Sequence[_One]) -> Boundary:
        """The mixed predictions, mixed by the graph's own weights."""
        path = tolerance.head_path(self.config)
        error = tolerance.CONFIDENCE * math.hypot(path.error(self.precision), self.norm.error(self.precision))
        found, wanted, limits = [], [], []
        for one in thoughts:
            plain, thought = self._ends(one)
            weight = torch.from_numpy(one.thinking.weight)[:, None]
            parts = ((1 - weight) * plain, weight * thought)
            mixed = parts[0] + parts[1]
            # Where they cancel, their errors do not.
            size = torch.stack([part.norm(dim=-1) for part in parts]).norm(dim=0).maximum(mixed.norm(dim=-1))
            found.append(torch.from_numpy(one.thinking.logits))
            wanted.append(self.head.logits(mixed))
            limits.append(error * size / mixed.norm(dim=-1).clamp_min(_SMALLEST) * wanted[-1].norm(dim=-1))
        carried = max(map(relative, found, self.free))
        return judge(name, found, wanted, limits, path.derivation(self.precision)).also(carried=carried)

    def _ends(self, one: _One) -> tuple[torch.Tensor, torch.Tensor]:
        """What is mixed: the normed hidden states that thoughts start from, and those that they end with, [n, D]."""
        return self.head.norm(one.trunk), self.head.norm(one.before(self.head.steps + 1))

    def _last(self, shared: Mapping[str, torch.Tensor], r: Recording) -> tuple[torch.Tensor, ...]:
        """The model's last hidden states, and what else ``ThinkingHead.rows`` takes."""
        return shared["hidden"], torch.tensor([len(r.before)]), *([shared["pre"]] if "pre" in shared else [])

    def _free(self, free: Mapping[str, torch.Tensor], r: Recording) -> torch.Tensor:
        """Logits [n, V] of the thoughts of the free-running reference, which may think other tokens than the graph."""
        held = [torch.from_numpy(r.held[layer, "latent"])[None] for layer in self.layers]
        rows = [one["latent"] for one in self.exact.rows(*self._last(free, r))]
        latents = [torch.cat(pair, 1) for pair in zip(held, rows, strict=True)]
        at = len(r.before) + torch.arange(len(r.tokens))[None]
        return self.exact.think(self._collapsed(self.exact, free)[None], at, *latents).logits[0]

    def _error(self, paths: Sequence[Any]) -> float:
        """Of independent errors, relative to what comes out."""
        return math.hypot(*(path.error(self.precision) for path in paths)) if paths else 0.0
