"""engram_conv as a kernel."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import C_TYPES, Kernel
from v4export.plugins.kernels.size import cdiv

_SPAN = 8

CONV = Kernel(
    "EngramConv",
    Path(__file__).with_name("kernel.cu"),
    inputs=("rows T B S P", "ring * B R P", "weight * P K", "position int64 B"),
    outputs=("out T B S P",),
    compiled="P K",
    scalars="S",
    choose=lambda d: {"VEC": gcd(d.P, 4), "SPAN": _SPAN},
    grid=lambda d: (cdiv(d.S, _SPAN) * d.B, cdiv(d.P, 128 * d.VEC)),
)


def kernels(call: Any, rows, ring, weight, position, dilation):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    ring_type, weight_type = (C_TYPES[call.dtype_of(operand)] for operand in (ring, weight))
    return call(CONV, rows, ring, weight, position, DILATION=dilation, RING_TYPE=ring_type, WEIGHT_TYPE=weight_type)
