"""Rows that a graph keeps as E4M3: what they stand for, and whether they are the reference's, rounded.

A number near the middle between two of E4M3 falls to one side or the other, and is moved by up to an eighth of itself
where what was before it differs in the last bit. In float32 that is one number of some ten thousand: no limit on the
difference is both passed by it and of use. So it is done as with what a router chooses. The graph's rows are taken as
they are by everything that reads them, and whether they are right is asked by itself:

* A multiplier is max|x| / 448 of its columns, and off by no more than x may be.
* A number q with the multiplier s was made of some x that E4M3 rounds to q, hence from an interval around q*s. If the
  graph's x differs from the reference's by e, the reference's is no more than |e| outside of that interval: what is
  outside is held to the limit of rows that are not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import torch

from v4export.config import ModelConfig
from v4export.model.linear import activations_of
from v4export.precision import Precision
from v4export.state_contract import E4M3, FLOAT32, ROTATED, SCALE, SCALED, StateTensor, state_tensors
from v4export.verify.boundary import Boundary, judge
from v4export.verify.recording import Recording

_NUMBERS = torch.from_numpy(np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
_MIDDLES = (_NUMBERS[1:] + _NUMBERS[:-1]) / 2
#: Of each number that is not negative, the interval that is rounded to it; that of 0 reaches below, too, and that of
#: the largest as far as if there were another.
_LOWEST = torch.cat([-_MIDDLES[:1], _MIDDLES])
_HIGHEST = torch.cat([_MIDDLES, 2 * _NUMBERS[-1:] - _MIDDLES[-1:]])

Tensors = Mapping[tuple[int, str], np.ndarray]


def as_read(recording: Recording, config: ModelConfig, precision: Precision) -> Recording:
    """The same with rows of the activations' type, as attention reads them, in place of what they are kept in."""
    if not config.state_fp8:
        return recording
    stored = activations_of(precision)

    def read(tensors: Tensors) -> dict[tuple[int, str], np.ndarray]:
        rows = {place: value for place, value in tensors.items() if not place[1].endswith((SCALE, ROTATED))}
        for (layer, name), value in rows.items():
            scale, rotated = (tensors.get((layer, name + end)) for end in (SCALE, ROTATED))
            if scale is not None:
                wide = torch.from_numpy(value) * _spread(torch.from_numpy(scale), value.shape[-1])
                wide = wide.to(stored).float()
                rows[layer, name] = np.concatenate([wide, *([] if rotated is None else [rotated])], -1)
        return rows

    return replace(recording, held=read(recording.held), state=read(recording.state), rows=read(recording.rows))


def new_rows(recording: Recording, config: ModelConfig, layer: int) -> dict[str, torch.Tensor]:
    """The graph's own new rows of a layer, [1, U, W], to be read in place of a reference's; ``config`` has both parts.

    An entry that is not complete is seen by no token, and is not recorded.
    """
    found = {}
    for tensor in narrow(config, layer):
        place = layer, tensor.name
        rows = recording.rows[place] if tensor.ring else recording.state[place][len(recording.held[place]) :]
        missing = tensor.returned(len(recording.tokens)) - len(rows)
        found[tensor.name] = torch.nn.functional.pad(torch.from_numpy(rows)[None], (0, 0, 0, missing))
    return found


def narrow(config: ModelConfig, layer: int) -> list[StateTensor]:
    """The tensors of E4M3 of a layer's state."""
    return [tensor for tensor in state_tensors(config, layer) if tensor.dtype == E4M3]


def judge_rows(
    name: str,
    recorded: Sequence[Recording],
    tensor: StateTensor,
    layer: int,
    wanted: Sequence[torch.Tensor],
    relative: Sequence[float],
    derivation: str,
) -> Iterator[Boundary]:
    """Compare rows that can still be seen at the end: one state tensor, or each of those that they are kept in.

    Args:
        name: of the boundary.
        recorded: what the graph left.
        tensor: as the graph keeps it, the first of several.
        layer: whose it is.
        wanted: the reference's rows before any rounding, of the recorded tokens alone, [n, W] for each sequence.
        relative: limit of an error relative to its row, for each sequence.
        derivation: of the limits.
    """

    def found(kept: str) -> list[torch.Tensor]:
        # Rows of tokens that are not recorded come first, if they can still be seen.
        rows = [r.state[layer, kept] for r in recorded]
        return [torch.from_numpy(one[len(one) - len(w) :]) for one, w in zip(rows, wanted, strict=True)]

    def limits(of: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [share * rows.norm(dim=-1) for share, rows in zip(relative, of, strict=True)]

    numbers = found(tensor.name)
    if tensor.dtype != E4M3:
        yield judge(name, numbers, wanted, limits(wanted), derivation)
        return
    rotated = [w[..., tensor.width :] for w in wanted]
    wanted = [w[..., : tensor.width] for w in wanted]
    given, own = found(tensor.name + SCALE), [_scales(w) for w in wanted]
    nearest = [_nearest(*one) for one in zip(wanted, numbers, given, strict=True)]
    yield judge(name, nearest, wanted, limits(wanted), f"beyond what E4M3 rounds to the same numbers; {derivation}")
    yield judge(f"{name} multipliers", given, own, limits(own), derivation)
    if rotated[0].shape[-1]:
        yield judge(f"{name} rotated", found(tensor.name + ROTATED), rotated, limits(rotated), derivation)


def _nearest(wanted: torch.Tensor, numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of what is rounded to the graph's numbers that which is nearest to the reference; NaN where they are none."""
    scale = _spread(scale, numbers.shape[-1])
    at = torch.searchsorted(_NUMBERS, numbers.abs().contiguous()).clamp(max=len(_NUMBERS) - 1)
    low, high = _LOWEST[at], _HIGHEST[at]
    negative = numbers < 0
    low, high = torch.where(negative, -high, low), torch.where(negative, -low, high)
    return torch.where(numbers.isfinite(), wanted.clamp(low * scale, high * scale), torch.nan)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """The multipliers of rows [n, W], as the definition says."""
    pieces = [piece.abs().amax(-1) for piece in rows.split(SCALED, -1)]
    return (torch.stack(pieces, -1) / _NUMBERS[-1]).clamp_min(float(np.finfo(FLOAT32).tiny))


def _spread(scale: torch.Tensor, width: int) -> torch.Tensor:
    """The multiplier of each column."""
    return scale.repeat_interleave(SCALED, -1)[..., :width]
