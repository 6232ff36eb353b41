"""What every kind of attention returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attended(NamedTuple):
    """What an attention returns.

    Attributes:
        output: [M, D].
        rows: new rows of each state tensor of the layer, by name.
        selected: what an indexer selected, int64 [M, K], -1 where it selected nothing; None without an indexer.
        candidates: blocks that it kept for later layers to select among, int64 [M, K], -1 for none; or None.
    """

    output: Tensor
    rows: dict[str, Tensor]
    selected: Tensor | None = None
    candidates: Tensor | None = None
