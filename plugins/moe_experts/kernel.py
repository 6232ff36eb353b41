"""moe_experts as four kernels: pairs sorted by expert, up, down, and a token's experts added up.

Matrices enter as ``call.tables`` gives them: a table of addresses where tensors have any, stacks in a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4export.plugins.kernels.kernel import ACTIVATIONS, Constant, Kernel, Sizes, Unfit
from v4export.plugins.kernels.size import cdiv, least

_HERE = Path(__file__).parent
#: What the sources call a form of matrices, by the type that they are stored in; PLAIN is that of the activations.
PLAIN = "PLAIN"
FORMATS = {"uint8": "FP4", "float4_e2m1": "FP4", "float8_e4m3fn": "FP8"}
#: Columns of an FP8 block must be a multiple of what a product takes between two multipliers.
FP8_COLUMNS = 64
#: Tokens of a tile, by the form of matrices: as many as leave registers for two blocks of threads and more.
TOKENS = {"PLAIN": 32, "FP8": 16, "FP4": 16}
_ROWS = 16

SORT = Kernel(
    "ExpertSort",
    _HERE / "sort.cu",
    inputs=("indices int64 N",),
    outputs=("order int32 N", "tiles int32 L 3"),
    compiled="E",
    scalars="N L",
    derived={"L": lambda d: least(d.N, d.N // d.TOKENS + d.E)},
    threads=lambda _: 256,
)
SUM = Kernel(
    "ExpertSum",
    _HERE / "sum.cu",
    inputs=("out float32 M K D",),
    outputs=("y T M D",),
    compiled="D",
    scalars="K",
    grid=lambda d: (d.M, cdiv(d.D, 256)),
    threads=lambda _: 256,
)


def _stacks(parts: int, *names: str) -> list[str]:
    """Operands of E matrices each: a table, or so many stacks."""
    if parts == 0:
        return [f"{name} int64 E" for name in names]
    return [f"{name}{i} * E{i} {name}_numbers" for name in names for i in range(parts)]


def _choose(d: Sizes) -> Mapping[str, Constant]:
    """Whether rows of activations' numbers are whole vectors, and how many blocks share registers."""
    return {"EVEN": int(d.D % 8 == 0 and d.F % 8 == 0), "RESIDENT": 2 if d.type_T == ACTIVATIONS[0] else 3}


def _suffix(stored: str, parts: int) -> str:
    """What a name says of the matrices: their form where they have to be widened, and in how many stacks they come."""
    return ("" if stored == PLAIN else stored.title()) + (f"In{parts}" if parts else "")


@functools.cache
def up_kernel(stored: str, parts: int) -> Kernel:
    """ExpertUp, for matrices of a form in so many parts."""
    names = ["gate", "up", *([] if stored == PLAIN else ["gate_scale", "up_scale"])]
    return Kernel(
        f"ExpertUp{_suffix(stored, parts)}",
        _HERE / "up.cu",
        inputs=["x T M D", "order int32 N", "tiles int32 L 3", *_stacks(parts, *names)],
        outputs=["h T N F"],
        compiled="D F K",
        choose=_choose,
        grid=lambda d: (cdiv(d.F, _ROWS), d.L),
    )


@functools.cache
def down_kernel(stored: str, parts: int) -> Kernel:
    """ExpertDown, for matrices of a form in so many parts."""
    names = ["down", *([] if stored == PLAIN else ["down_scale"])]
    return Kernel(
        f"ExpertDown{_suffix(stored, parts)}",
        _HERE / "down.cu",
        inputs=["h T N F", "weights float32 N", "order int32 N", "tiles int32 L 3", *_stacks(parts, *names)],
        outputs=["out float32 N D"],
        compiled="D F",
        choose=_choose,
        grid=lambda d: (cdiv(d.D, _ROWS), d.L),
    )


def kernels(  # type: ignore[no-untyped-def]
    call: Any, x, weights, indices, gate, up, down, gate_scale, up_scale, down_scale, rows, columns, limit
):
    """The op as calls of kernels.

    Raises:
        Unfit: FP8 blocks are narrower than a product's step.
    """
    (_, D), (_, K), F = x.shape, indices.shape, gate[0].shape[-2]
    stored = FORMATS.get(call.dtype_of(gate[0]), PLAIN)
    if stored == "FP8" and columns % FP8_COLUMNS:
        raise Unfit(f"FP8 blocks have {columns} columns, and the kernel needs a multiple of {FP8_COLUMNS}")
    dtype = call.dtype_of(x)
    constants = {"FORMAT": stored, "ROWS": rows, "COLUMNS": columns}
    constants["TOKENS"] = 8 if dtype == ACTIVATIONS[0] else TOKENS[stored]
    order, tiles = call(SORT, call.reshape(indices, -1), E=len(gate), TOKENS=constants["TOKENS"])
    operands, stacked = call.tables(gate, up, gate_scale, up_scale)
    up_of, down_of = (make(stored, stacked["PARTS"]) for make in (up_kernel, down_kernel))
    (h,) = call(up_of, x, order, tiles, *operands, F=F, K=K, LIMIT=float(limit or 0.0), **stacked, **constants)
    operands, stacked = call.tables(down, down_scale)
    (out,) = call(down_of, h, call.reshape(weights, -1), order, tiles, *operands, D=D, **stacked, **constants)
    return call(SUM, call.reshape(out, -1, K, D), TYPE=dtype)
