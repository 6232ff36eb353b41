"""hyper_coefficients as kernels: hyper_connection's products, and shares made of their sums."""

from __future__ import annotations

from math import isqrt
from pathlib import Path
from typing import Any

from v4export.plugins.hyper_connection.kernel import PROJECT
from v4export.plugins.kernels.kernel import Kernel

SHARES = Kernel(
    "HyperShares",
    Path(__file__).with_name("kernel.cu"),
    inputs=("partials float32 M P SUMS", "base float32 N", "scale float32 THREE"),
    outputs=("pre float32 M X", "post float32 M X", "comb float32 M X X"),
    compiled="N X",
    scalars="P",
    choose=lambda d: {"X": isqrt(d.N + 1) - 1},  # N = (2 + X) * X
    grid=lambda d: (d.M,),
)


def kernels(call: Any, streams, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    (partials,) = call(PROJECT, streams, fn)
    return call(SHARES, partials, base, scale, ITERATIONS=iterations, EPS=float(eps), NORM_EPS=float(norm_eps))
