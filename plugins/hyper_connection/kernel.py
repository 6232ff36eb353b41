"""hyper_connection as kernels: products of all streams, cut up as a GPU needs, and what is made of the sums."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import Kernel, Sizes
from v4export.plugins.kernels.size import Size, cdiv, least, most

_WARPS = 4
#: Sums that a thread may hold without running out of registers, and blocks that a large GPU runs at once.
_SUMS, _BLOCKS = 48, 132
#: Threads of a block that collapses streams, at most.
_THREADS = 512


def _tokens(d: Sizes) -> int:
    """How many tokens share one reading of fn."""
    return max(1, min(8, _SUMS // -(-(2 + d.X) * d.X // _WARPS)))


def _parts(d: Sizes) -> Size:
    """Into how many parts the channels are cut."""
    return most(1, least(cdiv(d.X * d.D, 32 * d.VEC), cdiv(_BLOCKS, most(1, cdiv(d.M, d.TOKENS)))))


def _slices(d: Sizes) -> int:
    """How many blocks share the collapse of a token's streams."""
    return -(-d.D // (d.VEC * _THREADS))


PROJECT = Kernel(
    "HyperProject",
    Path(__file__).with_name("project.cu"),
    inputs=("streams T M X D", "fn float32 N C"),
    outputs=("partials float32 M P SUMS",),
    compiled="X D",
    scalars="M",
    choose=lambda d: {"VEC": gcd(d.X * d.D, 4), "TOKENS": _tokens(d)},
    derived={"P": _parts, "SUMS": lambda d: (2 + d.X) * d.X + 1},
    grid=lambda d: (cdiv(d.M, d.TOKENS), d.P),
    threads=lambda d: 32 * _WARPS,
)

COLLAPSE = Kernel(
    "HyperCollapse",
    Path(__file__).with_name("kernel.cu"),
    inputs=("streams T M X D", "partials float32 M P SUMS", "base float32 N", "scale float32 THREE"),
    outputs=("z T M D", "post float32 M X", "comb float32 M X X"),
    compiled="X D",
    scalars="P",
    choose=lambda d: {"VEC": gcd(d.D, 4 if d.type_T == "float32" else 8)},
    grid=lambda d: (d.M, _slices(d)),
    threads=lambda d: 32 * -(-d.D // (d.VEC * 32 * _slices(d))),
)


def kernels(call: Any, streams, fn, base, scale, iterations, eps, norm_eps):  # type: ignore[no-untyped-def]
    """The op as calls of kernels."""
    (partials,) = call(PROJECT, streams, fn)
    return call(
        COLLAPSE,
        streams,
        partials,
        base,
        scale,
        ITERATIONS=iterations,
        EPS=float(eps),
        NORM_EPS=float(norm_eps),
    )
