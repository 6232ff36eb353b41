"""One line of the report, and how a graph's vectors are judged against the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from v4export.verify import tolerance

#: Evidence of near ties that one boundary lists.
SHOWN = 20
#: Parts of a limit between which vectors are counted; what is beyond the last is wrong.
PARTS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class Boundary:
    """One line of the report.

    Attributes:
        name: of the boundary.
        ok: every figure is within its limit.
        max_abs: largest difference of one number.
        rel: largest relative difference of a token's vector.
        limit: of ``rel`` at that token.
        cos: cosine between all of the graph's and all of the reference's numbers.
        derivation: where the limit comes from.
        mean: root mean square over the tokens of error divided by expected error; 0 where none is expected.
        mean_limit: of ``mean``.
        carried: relative difference to the free-running reference in the checkpoint's own weights.
        weights: relative difference that converting the weights alone causes; None where none loses anything.
        ties: tokens whose experts, or whose selected tokens or entries, differ within a near tie.
        spread: how many vectors have an error of up to each of ``PARTS`` of their limits, and how many a larger one.
        load: of every expert, the tokens that chose it.
        selective: tokens that saw more than an indexer may select, and of how many.
        notes: what is wrong, for people.
        evidence: what was chosen differently within a near tie, for people; at most ``SHOWN`` of them.
        verdict: ``FAIL``, ``AMBIGUOUS`` (it passes, and there are near ties), or ``PASS``; it follows from the rest.
    """

    name: str
    ok: bool
    max_abs: float
    rel: float
    limit: float
    cos: float
    derivation: str
    mean: float = 0.0
    mean_limit: float = 0.0
    carried: float | None = None
    weights: float | None = None
    ties: int = 0
    spread: tuple[int, ...] = ()
    load: tuple[int, ...] = ()
    selective: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    verdict: str = field(init=False, default="")

    def __post_init__(self) -> None:
        # A field and not a property, so that the report's JSON has it.
        verdict = "FAIL" if not self.ok else "AMBIGUOUS" if self.ties else "PASS"
        object.__setattr__(self, "verdict", verdict)

    @property
    def experts(self) -> tuple[int, int] | None:
        """How many experts took part, and of how many."""
        return (sum(map(bool, self.load)), len(self.load)) if self.load else None

    def also(self, wrong: tuple[str, ...] = (), **figures: Any) -> Boundary:
        """The same with more figures; anything in ``wrong`` fails it."""
        return replace(self, ok=self.ok and not wrong, notes=self.notes + wrong, **figures)


def shown(lines: Sequence[str]) -> tuple[str, ...]:
    """The first few lines, and how many more there are."""
    more = len(lines) - SHOWN
    return (*lines[:SHOWN], *([f"and {more} more"] if more > 0 else []))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of the reference."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def judge(
    name: str,
    found: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    allowed: Sequence[torch.Tensor],
    derivation: str,
) -> Boundary:
    """Compare vectors token by token, with hyper-connections stream by stream.

    Args:
        name: of the boundary.
        found: the graph's, one [n, D] or [n, X, D] for each sequence.
        wanted: the reference's.
        allowed: largest norm that the difference of each vector may have, [n] or [n, X].
        derivation: of the limits.
    """
    a, b, limit = (torch.cat(list(parts)).double() for parts in (found, wanted, allowed))
    if not len(b):
        return Boundary(name, True, 0.0, 0.0, 0.0, 1.0, "nothing to compare: these prompts are too short for a row")
    difference, size = (a - b).norm(dim=-1), b.norm(dim=-1).clamp_min(1e-30)
    excess = torch.where(limit > 0, difference / limit.clamp_min(1e-300), torch.where(difference > 0, torch.inf, 0.0))
    # NaN compares false with everything: it must not pass for a small number.
    excess = torch.where((a.isfinite() & b.isfinite()).all(-1), excess, torch.inf)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    at = tuple(int(i) for i in worst)
    notes: tuple[str, ...] = ()
    if not excess[at] <= 1:
        channel = int((a - b)[at].abs().argmax())
        here, there = float(a[at][channel]), float(b[at][channel])
        notes = (f"{_place(at, wanted)}, channel {channel}: {here:.6g}, the reference has {there:.6g}",)
    # Of a look-up no error is expected, and a single bit has failed it already.
    mean = float((excess * tolerance.CONFIDENCE).square().mean().sqrt()) if bool((limit > 0).all()) else 0.0
    # Streams share their errors, so it is tokens that average.
    mean_limit = tolerance.mean_limit(len(a)) if mean else 0.0
    if not mean <= mean_limit:
        notes += (f"over {len(a)} tokens {mean:.3g} times the error that rounding explains, at most {mean_limit:.3g}",)
    return Boundary(
        name,
        not notes,
        float((a - b).abs().max()),
        float(difference[at] / size[at]),
        float(limit[at] / size[at]),
        float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)),
        derivation,
        mean,
        mean_limit,
        spread=tuple(
            torch.bincount(torch.bucketize(excess, torch.tensor(PARTS)).flatten(), minlength=len(PARTS) + 1).tolist()
        ),
        notes=notes,
    )


def _place(at: tuple[int, ...], parts: Sequence[torch.Tensor]) -> str:
    """A vector's place, in words: which sequence, which token (or row) of it, which stream."""
    row, sequence = at[0], 0
    while row >= len(parts[sequence]):
        row -= len(parts[sequence])
        sequence += 1
    return f"sequence {sequence}, token {row}" + "".join(f", stream {i}" for i in at[1:])
