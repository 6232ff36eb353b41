"""What an evaluation found, and how it is computed from single tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

#: Columns of what is kept of every scored token.
REFERENCE_NLL, NLL, DIVERGENCE, SAME, PROBABILITY = range(5)
#: What a recipe is called besides, whose cached rows are E4M3.
FP8_STATE = " + fp8 state"


@dataclass(frozen=True)
class Quality:
    """How well a recipe predicts a text, and how far it is from the float32 reference.

    Errors are standard errors of means over tokens, as if tokens were independent.

    Attributes:
        perplexity: exp of the mean of -ln p(token).
        perplexity_error: its standard error.
        change: perplexity over the reference's, less 1.
        change_error: its standard error; tokens are compared one by one, so it is far less than perplexity's own.
        divergence: mean Kullback-Leibler divergence of predictions from the reference's, nats a token.
        divergence_error: its standard error.
        divergence_median: of single tokens.
        divergence_99: 99 % of tokens are below it.
        divergence_max: of single tokens.
        top1: share of tokens at which both find the same token likeliest.
        top1_error: its standard error.
        probability_mean: mean change of the probability of the text's token.
        probability_rms: root of the mean square of that change.
    """

    perplexity: float
    perplexity_error: float
    change: float
    change_error: float
    divergence: float
    divergence_error: float
    divergence_median: float
    divergence_99: float
    divergence_max: float
    top1: float
    top1_error: float
    probability_mean: float
    probability_rms: float

    @classmethod
    def of(cls, tokens_N5: np.ndarray) -> Quality:
        """From what was kept of N tokens, one at least."""
        nll, divergence, same, moved = (tokens_N5[:, i] for i in (NLL, DIVERGENCE, SAME, PROBABILITY))
        perplexity = _exp(float(nll.mean()))
        ratio = nll - tokens_N5[:, REFERENCE_NLL]
        change = _exp(float(ratio.mean()))
        return cls(
            perplexity,
            perplexity * _error(nll),
            change - 1,
            change * _error(ratio),
            float(divergence.mean()),
            _error(divergence),
            float(np.median(divergence)),
            float(np.quantile(divergence, 0.99)),
            float(divergence.max()),
            float(same.mean()),
            _error(same),
            float(moved.mean()),
            float(np.sqrt(np.square(moved).mean())),
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _error(values: np.ndarray) -> float:
    """Standard error of the mean; that of one value is not known."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class LayerError:
    """How far a recipe's hidden states after a layer are from the reference's: root mean square over tokens.

    Of each token it is the norm of the difference over that of the reference.

    Attributes:
        layer: its number.
        kind: of the layer.
        own: where it is fed the reference's hidden states: what rounding in this layer does.
        carried: where it is fed what the layers before it made.
    """

    layer: int
    kind: str
    own: float
    carried: float


@dataclass(frozen=True)
class RecipeResult:
    """One recipe.

    Attributes:
        name: the recipe; ``graph`` in front of it where an exported graph was run.
        bytes: of all weights in the graph, multipliers included.
        bits_per_weight: of each number on average.
        state_bytes_per_token: by which a sequence's state grows with each token.
        layers: their errors; none of an exported graph.
        quality: None where only the first layers were evaluated.
    """

    name: str
    bytes: int
    bits_per_weight: float
    state_bytes_per_token: float
    layers: tuple[LayerError, ...] = ()
    quality: Quality | None = None

    @property
    def worst(self) -> LayerError | None:
        """The layer whose own error is largest."""
        return max(self.layers, key=lambda one: _sortable(one.own), default=None)


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Evaluation:
    """What ``v4export eval`` found.

    Attributes:
        model: checkpoint or bundle.
        text: file of the text.
        text_tokens: of the whole text.
        windows: that were evaluated, each by itself.
        context: tokens of a window.
        scored: tokens that were predicted.
        evaluated_layers: how many first layers were evaluated.
        model_layers: how many the model has.
        recipes: the reference first.
        notes: what is not as it was asked for, and why.
    """

    model: str
    text: str
    text_tokens: int
    windows: int
    context: int
    scored: int
    evaluated_layers: int
    model_layers: int
    recipes: tuple[RecipeResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all layers were evaluated, so that there are predictions."""
        return self.evaluated_layers == self.model_layers


#: A title, and what stands below it; the first are known without running a recipe.
_Column = tuple[str, Callable[[RecipeResult], str]]
_SIZES: tuple[_Column, ...] = (
    ("recipe", lambda one: one.name),
    ("MiB", lambda one: f"{one.bytes / 2**20:,.1f}"),
    ("bits", lambda one: f"{one.bits_per_weight:.2f}"),
    ("B/token", lambda one: f"{one.state_bytes_per_token:,.0f}"),
)
_PREDICTIONS: tuple[tuple[str, Callable[[Quality], str]], ...] = (
    ("perplexity", lambda q: f"{q.perplexity:.3f} ±{q.perplexity_error:.3f}"),
    ("change, %", lambda q: f"{100 * q.change:+.3f} ±{100 * q.change_error:.3f}"),
    ("KL, nats", lambda q: f"{q.divergence:.5f} ±{q.divergence_error:.5f}"),
    ("top-1, %", lambda q: f"{100 * q.top1:.2f} ±{100 * q.top1_error:.2f}"),
)
#: What a screen has no room for.
_MORE: tuple[tuple[str, Callable[[Quality], str]], ...] = (
    ("KL median", lambda q: f"{q.divergence_median:.5f}"),
    ("KL 99 %", lambda q: f"{q.divergence_99:.4f}"),
    ("KL max", lambda q: f"{q.divergence_max:.3f}"),
    ("RMS Δp, %", lambda q: f"{100 * q.probability_rms:.3f}"),
)
_WORST: _Column = ("worst layer", lambda one: f"{one.worst.own:.2%} ({one.worst.layer})" if one.worst else "")
_LAST: _Column = ("after the last", lambda one: f"{one.layers[-1].carried:.2%}" if one.layers else "")


def rows(found: Evaluation, more: bool = False) -> list[tuple[str, ...]]:
    """The table, header first; with ``more``, columns that a screen has no room for.

    The worst layer is that with the largest error of its own, its number in brackets.
    """
    predicted = (*_PREDICTIONS, *(_MORE if more else ())) if found.whole else ()
    columns = (*_SIZES, *(_of_quality(*one) for one in predicted), *(() if found.whole else (_LAST,)), _WORST)
    return [tuple(title for title, _ in columns), *(tuple(show(one) for _, show in columns) for one in found.recipes)]


def _of_quality(title: str, show: Callable[[Quality], str]) -> _Column:
    return title, lambda one: show(one.quality) if one.quality else ""


def summary(found: Evaluation) -> str:
    """What was evaluated, in a sentence."""
    text = f"{found.scored:,} tokens of {found.text} in {found.windows:,} windows of {found.context}"
    if found.whole:
        return text
    return f"{text}; first {found.evaluated_layers} of {found.model_layers} layers: no perplexity"
