"""What is kept of attention's new rows: themselves, or E4M3 numbers with multipliers (``state_contract``).

Which of them is said by ``ModelConfig.state_fp8`` alone.

A row is cut into ``SCALED`` columns, each with the multiplier max|x| / 448, so that its largest number is the largest
of E4M3, and every number is within a sixteenth of itself, or 2^-10 of the multiplier where it is next to nothing. The
last columns of keys, which are rotated, are kept as they are.
New rows are rounded before their own step reads them: a token sees of any other the same, however a sequence is cut
into steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from v4export.config import ModelConfig
from v4export.plugins.fp8_rows.op import from_fp8, to_fp8
from v4export.state_contract import ROTATED, SCALE, SCALED, exact_columns

#: How the names of rows begin that are to be read in place of a block's own, among what it shares.
IN_PLACE_OF = "in_place_of."

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
#: A multiplier that is less than a normal float32 number might be taken for 0, and rows of zeros have one, too.
_SMALLEST = torch.finfo(torch.float32).tiny


class Kept(NamedTuple):
    """New rows of one name.

    Attributes:
        tensors: what is kept of them, by the state's names.
        read: the rows as attention reads them, in the activations' type.
    """

    tensors: dict[str, Tensor]
    read: Tensor


def keep(config: ModelConfig, name: str, new_BSW: Tensor, shared: Mapping[str, Tensor]) -> Kept:
    """What is kept of new rows; ``shared`` may hold others that are read in their place."""
    tensors = {name: new_BSW}
    if config.state_fp8:
        exact = exact_columns(config, name)
        rounded, rotated = new_BSW.split([new_BSW.shape[-1] - exact, exact], -1)
        numbers, scale = narrowed(rounded)
        tensors = {name: numbers, name + SCALE: scale} | ({name + ROTATED: rotated} if exact else {})
    return Kept(tensors, shared.get(IN_PLACE_OF + name, read(tensors, new_BSW.dtype)[name]))


def narrowed(rows_BUW: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as E4M3 of the same shape, and their multipliers, float32 [B, U, ceil(W/64)]."""
    blocks = _blocks(rows_BUW.float())
    scale = (blocks.abs().amax(-1) / _LARGEST).clamp_min(_SMALLEST)
    return to_fp8(_joined(blocks / scale.unsqueeze(-1), rows_BUW.shape[-1])), scale


def widened(narrow_BTW: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that E4M3 numbers and their multipliers stand for."""
    blocks = _blocks(from_fp8(narrow_BTW)) * scale.unsqueeze(-1)
    return _joined(blocks, narrow_BTW.shape[-1]).to(dtype)


def read(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors, and rows of the activations' type in place of those that are kept in several."""

    def one(name: str) -> Tensor:
        if name + SCALE not in tensors:
            return tensors[name]
        rounded = widened(tensors[name], tensors[name + SCALE], dtype)
        return torch.cat([rounded, tensors[name + ROTATED]], -1) if name + ROTATED in tensors else rounded

    return {name: one(name) for name in tensors if not name.endswith((SCALE, ROTATED))}


def _blocks(rows_BUW: Tensor) -> Tensor:
    """Rows cut into the columns that share a multiplier, [B, U, blocks, columns]; zeros fill the last up."""
    width = rows_BUW.shape[-1]
    if width > SCALED and width % SCALED:
        rows_BUW = torch.nn.functional.pad(rows_BUW, (0, -width % SCALED))
    return rows_BUW.unflatten(-1, (-1, min(width, SCALED)))


def _joined(blocks: Tensor, width: int) -> Tensor:
    """The rows again, without what filled them up."""
    rows = blocks.flatten(-2)
    return rows if rows.shape[-1] == width else rows[..., :width]
