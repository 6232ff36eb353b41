"""hyper_mix as a kernel."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Kernel
from v4export.plugins.kernels.size import cdiv

MIX = Kernel(
    "HyperMix",
    Path(__file__).with_name("kernel.cu"),
    inputs=("streams T M X D", "y T M D", "post float32 M X", "comb float32 M X X"),
    outputs=("mixed T M X D",),
    compiled="X D",
    choose=lambda d: {"VEC": gcd(d.D, 4 if d.type_T == "float32" else 8)},
    grid=lambda d: (d.M, cdiv(d.D, 128 * d.VEC)),
)


def kernels(call: Any, streams, y, post, comb):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    return call(MIX, streams, y, post, comb)
