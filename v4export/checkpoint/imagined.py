"""The weights of a configuration's checkpoint, as the Hub would have it, where there are no files yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from v4export.checkpoint.audit import Weight
from v4export.checkpoint.synth import planned_tensors
from v4export.checkpoint.tensor import StoredTensor
from v4export.config import ModelConfig

_NOWHERE = Path()


def imagined(config: ModelConfig) -> dict[str, Weight]:
    """Every weight by its canonical name, in reading order, stored as ``synth`` would; none can be read."""
    found: dict[str, Weight] = {}
    for planned in planned_tensors(config):
        one = planned.pieces[0]
        tensor = StoredTensor(planned.name, _NOWHERE, planned.dtype, planned.shape, 0, planned.nbytes)
        if planned.is_scale:
            found[one.name] = replace(found[one.name], scale=tensor)
        else:
            block = planned.quantized.block if planned.quantized else (1, 1)
            found[one.name] = Weight(one.name, one.shape, one.role, tensor, block=block)
    return found
