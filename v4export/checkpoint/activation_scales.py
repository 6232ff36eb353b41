"""Scales by which inputs are rounded to FP8: their names, and the safetensors file that they are kept in.

A linear layer has one, an expert two: of what its gate and its up read, and of what its down reads. They are named by
the Hub's names of the modules. A checkpoint has none; ``v4export calibrate`` makes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from v4export.checkpoint.names import expected, skip_reason
from v4export.checkpoint.tensor import read_header
from v4export.config import ModelConfig
from v4export.errors import BadInput
from v4export.precision import Precision, may_round_inputs

#: Name of the file in a bundle.
FILE = "activation_scales.safetensors"

_FORMAT = "v4export activation scales 1"
_SHOWN = 3


@dataclass(frozen=True)
class ActivationScales:
    """Scales of a model.

    Attributes:
        values: float32 [], or [E] of experts, by name.
        checkpoint: header hash of the checkpoint that they were made with.
        made: how, for people and for manifests.
    """

    values: Mapping[str, np.ndarray]
    checkpoint: str
    made: Mapping[str, Any] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        said = {"format": _FORMAT, "checkpoint": self.checkpoint, "made": json.dumps(self.made)}
        values = {name: np.asarray(value, np.float32) for name, value in self.values.items()}
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.write_bytes(save(values, said))
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def read_scales(file: Path, config: ModelConfig) -> ActivationScales:
    """The scales of a file, checked against a model.

    Raises:
        BadInput: it cannot be read, is something else, or its names, shapes or values are not those of the model.
    """
    try:
        header, tensors = read_header(file)
    except OSError as error:
        raise BadInput(f"cannot read {file}", str(error), "make one with v4export calibrate") from error
    said = json.loads(header).get("__metadata__") or {}
    if said.get("format") != _FORMAT or not isinstance(said.get("checkpoint"), str):
        raise BadInput(f"{file} has no activation scales", fix="make them with v4export calibrate")
    wanted = all_scales(config)
    # Layers that the user leaves out have scales in a file that was made of the whole model.
    values = {n: t.numpy() for n, t in tensors.items() if n in wanted or skip_reason(n, config) is None}
    faults = _faults(values, wanted)
    if faults:
        raise BadInput(
            f"the scales of {file} are not those of the model",
            "; ".join(faults),
            "make them anew, from this checkpoint, with v4export calibrate",
        )
    ordered = {name: values[name] for name in wanted}
    return ActivationScales(ordered, said["checkpoint"], json.loads(said.get("made", "{}")))


def check_checkpoint(scales: ActivationScales, file: Path, header_hash: str) -> None:
    """Raise BadInput if scales were made of another checkpoint than that with a header hash."""
    if scales.checkpoint != header_hash:
        raise BadInput(
            f"{file} was made of another checkpoint",
            f"header hash {scales.checkpoint[:12]}, this one has {header_hash[:12]}",
            "make scales of this one with v4export calibrate",
        )


def scale_names(matrix: str, role: str) -> tuple[str, ...]:
    """Names of the scales of the module that a matrix is of: one of a linear layer, two of all experts of a layer."""
    if role == "expert":
        experts = matrix.partition(".experts.")[0] + ".experts"
        return f"{experts}.input_scale", f"{experts}.middle_scale"
    return (matrix.removesuffix(".weight") + ".input_scale",)


def all_scales(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all scales that any recipe may need, by name."""
    return _shapes(config, {n: one.role for n, one in expected(config).items() if may_round_inputs(n, one.role)})


def wanted_scales(scales: Mapping[str, np.ndarray], config: ModelConfig, precision: Precision) -> dict[str, np.ndarray]:
    """Those that a recipe rounds by; a module that it keeps in another format may need none."""
    return {name: scales[name] for name in wanted_shapes(config, precision)}


def wanted_shapes(config: ModelConfig, precision: Precision) -> dict[str, tuple[int, ...]]:
    """Shapes of the scales that a recipe rounds by, by name."""
    kept = {n: one.role for n, one in expected(config).items() if precision.rounds_inputs_of(n, one.role)}
    return _shapes(config, kept)


def _shapes(config: ModelConfig, matrices: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    shape = {"linear": (), "expert": (config.num_experts,)}
    return {scale: shape[role] for name, role in matrices.items() for scale in scale_names(name, role)}


def _faults(values: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with scales, a phrase each."""
    there = [n for n in wanted if n in values]
    lists = {
        "missing": [n for n in wanted if n not in values],
        "of no module": [n for n in values if n not in wanted],
        "of the wrong shape or type": [
            n for n in there if values[n].shape != wanted[n] or values[n].dtype != np.float32
        ],
        # NaN compares false.
        "not positive numbers": [n for n in there if not ((values[n] > 0) & np.isfinite(values[n])).all()],
    }
    return [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}" for kind, names in lists.items() if names]
