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
#: What the sources call the formats of matrices that they read; PLAIN is that of the activations.
PLAIN = "PLAIN"
FORMATS = {"": PLAIN, "fp8": "FP8", "fp8-row": "FP8", "mxfp4": "FP4"}
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
    call: Any, x, weights, indices, gate, up, down, gate_scale, up_scale, down_scale, gate_scale_2, up_scale_2,
    down_scale_2, format, rows, columns, limit, input_scale=None, middle_scale=None,
):  # fmt: skip
    """The op as calls of kernels.

    Raises:
        Unfit: there is no kernel for the format or for experts that round what they multiply, or FP8 blocks are
            narrower than a product's step.
    """
    if input_scale is not None or middle_scale is not None:
        raise Unfit("no kernel rounds what experts multiply to FP8")
    (_, D), (_, K), F = x.shape, indices.shape, gate[0].shape[-2]
    if format not in FORMATS:
        raise Unfit(f"no kernel reads experts in {format}")
    stored = FORMATS[format]
    across = [columns or D, columns or F]  # of a block of gates and ups, and of downs
    odd = [size for size in across if size % FP8_COLUMNS]
    if stored == "FP8" and odd:
        raise Unfit(f"FP8 blocks have {odd[0]} columns, and the kernel needs a multiple of {FP8_COLUMNS}")
    dtype = call.dtype_of(x)
    constants = {"FORMAT": stored, "ROWS": rows}
    constants["TOKENS"] = 8 if dtype == ACTIVATIONS[0] else TOKENS[stored]
    order, tiles = call(SORT, call.reshape(indices, -1), E=len(gate), TOKENS=constants["TOKENS"])
    operands, stacked = call.tables(gate, up, gate_scale, up_scale)
    up_of, down_of = (make(stored, stacked["PARTS"]) for make in (up_kernel, down_kernel))
    constants["COLUMNS"] = across[0]
    (h,) = call(up_of, x, order, tiles, *operands, F=F, K=K, LIMIT=float(limit or 0.0), **stacked, **constants)
    operands, stacked = call.tables(down, down_scale)
    constants["COLUMNS"] = across[1]
    (out,) = call(down_of, h, call.reshape(weights, -1), order, tiles, *operands, D=D, **stacked, **constants)
    return call(SUM, call.reshape(out, -1, K, D), TYPE=dtype)
