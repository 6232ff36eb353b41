"""What computes each custom op in an engine: a plugin of our kernels, a layer of TensorRT's own, or the op's body.

Two tables: the ways a kernel gets into TensorRT, and what is chosen for each op in each of them, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4export.engine.targets import PACKAGES, Target
from v4export.errors import BadInput, NotSupported
from v4export.plugins import OPS
from v4export.plugins.kernels.kernel import PLAIN_SHARED

PLUGIN, NATIVE, BODY = "plugin", "native layer", "body"


@dataclass(frozen=True)
class Way:
    """A way for kernels into an engine.

    Attributes:
        name: what ``--plugins`` calls it.
        packages: that have it.
        needs: what a program must load beside the engine.
        when: it is used.
    """

    name: str
    packages: tuple[str, ...]
    needs: str
    when: str


WAYS = (
    Way("aot", ("tensorrt",), "nothing: the engine holds the kernels' code", "by default with tensorrt"),
    Way("library", PACKAGES, "the C++ library of plugins/library", "asked for: IPluginV3, for programs that prefer it"),
    Way(
        "none", PACKAGES, "nothing: ops are layers of TensorRT's own", "by default with tensorrt_rtx, which has no aot"
    ),
)
_BY_NAME = {way.name: way for way in WAYS}
#: The way that each package takes unless told otherwise.
DEFAULT_WAY = {"tensorrt": "aot", "tensorrt_rtx": "none"}


@dataclass(frozen=True)
class Implementation:
    """What computes an op, and why."""

    op: str
    way: str
    reason: str


_NATIVE = {
    **dict.fromkeys(
        ("TRT_BlockDequantize", "TRT_INT4DequantizeLinear"), "TensorRT widens blocks inside the product behind them"
    ),
    "DistCollective": "NCCL, by the communicator that a program sets",
}
#: Ops that TensorRT computes as well by itself.
_BODIES = {"HyperMix": "elementwise: TensorRT fuses it with its neighbours"}
#: Why the others are plugins.
_PLUGINS: Mapping[str, str] = {
    "MoeRoute": "one launch for some twenty layers",
    "HashRoute": "one launch for some ten layers",
    "MoeExperts": "reads chosen experts in their stored form, where the body copies them widened",
    "HyperConnection": "Sinkhorn's iterations in registers, where the body is a hundred layers",
    "HyperCoefficients": "Sinkhorn's iterations in registers, where the body is a hundred layers",
    "EngramGating": "one pass over the streams",
    "EngramConv": "reads its ring in place",
    "LatentAttention": "one pass over the cache, where the body writes all scores and widens rows",
    "SparseLatentAttention": "reads selected rows where they lie, where the body gathers them",
    "ThoughtAttention": "one pass over the cache, where the body writes all scores and widens rows",
    "IndexSelect": "writes one score a key, where the body writes one a head and key",
    "CandidateSelect": "writes one score a key, where the body writes one a head and key",
    "IndexReselect": "scores the keys of chosen blocks, where the body scores all",
    "WindowAttention": "reads its ring in place",
    "CompressedAttention": "one pass over ring and entries, where the body writes all scores",
    "SparseAttention": "reads selected entries where they lie, where the body gathers them",
    "CompressTokens": "one pass over the rows, where the body gathers them",
}


def implementation(op_type: str, way: str) -> Implementation:
    """What computes an op where plugins get in by ``way``."""
    if op_type in _NATIVE:
        return Implementation(op_type, NATIVE, _NATIVE[op_type])
    if op_type in _BODIES:
        return Implementation(op_type, BODY, _BODIES[op_type])
    if way == "none":
        return Implementation(op_type, BODY, "nothing is needed to load it")
    return Implementation(op_type, PLUGIN, _PLUGINS[op_type])


def resolve_way(asked: str | None, backend: str) -> str:
    """The way to take with a package; its default unless one is asked for.

    Raises:
        BadInput: there is no such way.
        NotSupported: this package has it not.
    """
    name = DEFAULT_WAY[backend] if asked in (None, "auto") else asked
    way = _BY_NAME.get(str(name))
    if way is None:
        known = ", ".join(["auto", *_BY_NAME])
        raise BadInput(f"Plugins cannot be had by {asked!r}", f"known: {known}", "Choose one of them.")
    if backend not in way.packages:
        raise NotSupported(
            f"{backend} has no plugins that are compiled ahead of time",
            f"--plugins {asked}   packages that have it: {', '.join(way.packages)}",
            "Use --plugins library, or --plugins none.",
        )
    return way.name


def shared_budget(way: str, targets: Sequence[Target]) -> int:
    """Bytes of shared memory that a launch may have on all targets. Ahead of time, nobody can ask for more than every
    launch has; without plugins there is no launch.

    Raises:
        NotSupported: a target is older than what kernels are compiled for.
    """
    if way == "none":
        return 0
    old = [target.name for target in targets if target.architecture == "Turing"]
    if old:
        raise NotSupported(
            f"Kernels are compiled for Ampere and later, not for {', '.join(old)}",
            f"targets: {', '.join(target.name for target in targets)}   --plugins {way}",
            "Leave that target out, or use --plugins none.",
        )
    return PLAIN_SHARED if way == "aot" else min(target.shared_kib for target in targets) << 10


def rows() -> list[tuple[str, ...]]:
    """The table, header first: what computes each op with each package, and why; what ``doctor`` prints."""
    table: list[tuple[str, ...]] = [("op", *PACKAGES, "why")]
    for op in OPS:
        found = [implementation(op.op_type, DEFAULT_WAY[package]) for package in PACKAGES]
        best = next((one for one in found if one.way != BODY), found[-1])
        table.append((op.op_type, *(one.way for one in found), best.reason))
    return table


def ways_rows() -> list[tuple[str, ...]]:
    """The ways in, header first."""
    return [
        ("--plugins", "with", "to load an engine", "used"),
        *((w.name, " ".join(w.packages), w.needs, w.when) for w in WAYS),
    ]
