"""Which recipes are evaluated, and how large each makes a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from v4export.checkpoint.activation_scales import wanted_scales
from v4export.checkpoint.audit import Weight, in_graph
from v4export.config import ModelConfig
from v4export.errors import BadInput, V4Error
from v4export.evaluate.lane import Lane
from v4export.evaluate.results import FP8_STATE, RecipeResult
from v4export.graphs.variants import roles
from v4export.graphs.weights import decide
from v4export.precision import NATIVE, PRECISIONS, Precision, native
from v4export.precision import precision as find_precision
from v4export.state_contract import bytes_per_token

#: Every recipe that the model can have.
ALL = "all"
REFERENCE = "fp32"


@dataclass(frozen=True)
class Subject:
    """What recipes are tried on.

    Attributes:
        config: the model, its cached rows in the activations' type.
        weights: of the audited checkpoint.
        token_map: token id -> compressed id, where there is Engram.
        scales: by which inputs are rounded to FP8, if they were calibrated.
    """

    config: ModelConfig
    weights: Mapping[str, Weight]
    token_map: np.ndarray | None = None
    scales: Mapping[str, np.ndarray] | None = None

    @property
    def reference(self) -> Lane:
        """Float32, with the checkpoint's own values."""
        return Lane(REFERENCE, PRECISIONS[REFERENCE], self.config, self.weights, self.token_map)

    def lane(self, precision: Precision, state_fp8: bool = False) -> Lane:
        """A recipe.

        Raises:
            BadInput: an exception to it says nothing, or it needs scales and there are none.
            NotSupported: a matrix cannot be stored so.
        """
        precision.check(roles(self.config))
        for weight in in_graph(self.weights, self.config).values():
            decide(weight, precision)
        scales: Mapping[str, np.ndarray] = {}
        if precision.inputs:
            if self.scales is None:
                raise BadInput(
                    f"{precision.name} rounds inputs by scales that have to be calibrated",
                    fix="give a text or the file of v4export calibrate: --calibrate FILE",
                )
            scales = wanted_scales(self.scales, self.config, precision)
        name = precision.name + (" + keep" if precision.keep else "") + (FP8_STATE if state_fp8 else "")
        config = replace(self.config, state_fp8=state_fp8)
        return Lane(name, precision, config, self.weights, self.token_map, scales)

    def sized(self, lane: Lane) -> RecipeResult:
        """What is known of a recipe without running it."""
        numbers = total = 0
        for weight in in_graph(self.weights, self.config).values():
            *rows, width = weight.shape or (1,)
            numbers += math.prod(weight.shape)
            total += lane.precision.format_of(weight.name, weight.role).nbytes(math.prod(rows), width)
        state = bytes_per_token(lane.config, lane.dtype.itemsize)
        return RecipeResult(lane.name, total, 8 * total / numbers, state)

    def lanes(self, names: Sequence[str], keep: Sequence[str], state_fp8: bool) -> tuple[list[Lane], list[str]]:
        """The recipes that are asked for, besides the reference; and why others of ``all`` are left out.

        Args:
            names: of recipes, ``native`` or ``all``.
            keep: exceptions to each.
            state_fp8: evaluate each once more with cached rows in E4M3.

        Raises:
            BadInput, NotSupported: a recipe cannot be had; of ``all``, none can.
        """
        optional = ALL in names
        wanted = [*PRECISIONS] if optional else [native(self.config) if n == NATIVE else n for n in names]
        found: list[Lane] = []
        notes: list[str] = []
        failed: V4Error | None = None
        for name in dict.fromkeys(wanted):
            try:
                made = self._variants(find_precision(name, self.config, keep), state_fp8)
            except V4Error as error:
                if not optional:
                    raise
                failed = error
                notes.append(f"{name} is left out: {error.what}")
            else:
                found += made
        if failed and not found and keep:
            raise failed
        return found, notes

    def _variants(self, precision: Precision, state_fp8: bool) -> list[Lane]:
        plain = self.lane(precision)
        is_reference = precision.name == REFERENCE and not precision.keep
        return [*([] if is_reference else [plain]), *([self.lane(precision, True)] if state_fp8 else [])]
