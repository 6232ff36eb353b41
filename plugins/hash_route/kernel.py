"""hash_route as a kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.kernels.size import cdiv
from v4export.plugins.moe_route.kernel import SCORINGS

_WARPS = 4

ROUTE = Kernel(
    "HashRoute",
    Path(__file__).with_name("kernel.cu"),
    inputs=("logits float32 M E", "table int64 V K", "ids int64 M"),
    outputs=("weights float32 M K", "indices int64 M K"),
    compiled="E K",
    scalars="M V",
    grid=lambda d: (cdiv(d.M, _WARPS),),
    threads=lambda d: 32 * _WARPS,
)


def kernels(call: Any, logits, table, ids, scoring, norm, scale):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return call(ROUTE, logits, table, ids, SCORING=SCORINGS[scoring], NORM=int(norm), SCALE=float(scale))
