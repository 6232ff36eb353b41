"""Which GPUs an engine can be built for, by which package, and what types their products take: one table, and questions
about it. A recipe (``v4export/precision.py``) can be built for a target that has all of its types.

TensorRT-RTX names compute capabilities and builds for any of them on any machine. TensorRT builds for the GPU that is
present.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from v4export.errors import BadInput, NotSupported, V4Error
from v4export.precision import PRECISIONS, Precision

#: What to export where a target lacks a recipe, and how to say so.
FALLBACK = {"mxfp4": "fp8", "nvfp4": "fp8"}
FALLBACK_NOTES = dict.fromkeys(FALLBACK, "no FP4: experts are FP8 E4M3 in blocks")
PACKAGES = ("tensorrt_rtx", "tensorrt")


@dataclass(frozen=True)
class Target:
    """One compute capability.

    Attributes:
        name: ``sm`` and the capability without its dot.
        architecture: NVIDIA's name of the generation.
        devices: names people use for its GPUs, in lower case without separators.
        types: of numbers that products are built for, or that are widened ahead of them.
        rtx: whether TensorRT-RTX can name it.
        default: whether TensorRT-RTX builds for it when no target is asked for.
        shared_kib: shared memory that a kernel's block can ask for.
    """

    name: str
    architecture: str
    devices: tuple[str, ...]
    types: tuple[str, ...]
    rtx: bool
    default: bool
    shared_kib: int

    @property
    def package(self) -> str:
        """The package that builds for it."""
        return PACKAGES[0] if self.rtx else PACKAGES[1]

    def has(self, precision: Precision, plugins: bool = False) -> bool:
        """Whether it has all types of a recipe; with plugins, but for those that only kernels read."""
        return {*precision.types(plugins)} <= {*self.types}


# TensorRT-RTX has no float32 matrix product for Turing ("FP32 GEMM is not supported"), which every recipe needs.
_FP16, _TO_BF16 = ("fp16", "int8"), ("fp32", "fp16", "bf16", "int8", "int4")
_TO_FP8, _TO_FP4 = (*_TO_BF16, "fp8"), (*_TO_BF16, "fp8", "fp4")
_ADA = ("rtx4090", "rtx4080", "rtx4070", "rtx4060", "l4", "l40", "l40s", "rtx6000ada")

TARGETS = (
    Target("sm75", "Turing", ("t4", "rtx2080", "rtx2080ti", "rtx6000turing"), _FP16, True, False, 64),
    Target("sm80", "Ampere", ("a100", "a30"), _TO_BF16, True, True, 163),
    Target(
        "sm86", "Ampere", ("rtx3090", "rtx3080", "rtx3070", "rtx3060", "a10", "a40", "a6000"), _TO_BF16, True, True, 99
    ),
    Target("sm89", "Ada", _ADA, _TO_FP8, True, True, 99),
    Target("sm90", "Hopper", ("h100", "h200", "h800", "h20", "gh200"), _TO_FP8, False, True, 227),
    Target("sm100", "Blackwell", ("b100", "b200", "gb200"), _TO_FP4, False, True, 227),
    Target("sm103", "Blackwell Ultra", ("b300", "gb300"), _TO_FP4, False, True, 227),
    Target("sm110", "Blackwell", ("thor", "jetsonthor"), _TO_FP8, False, True, 227),
    Target("sm120", "Blackwell", ("rtx5090", "rtx5080", "rtx5070", "rtx5060", "rtxpro6000"), _TO_FP4, True, True, 99),
    Target("sm121", "Blackwell", ("gb10", "dgxspark"), _TO_FP4, True, True, 99),
)

_BY_NAME = {target.name: target for target in TARGETS}
_ALIASES = {device: target for target in TARGETS for device in target.devices}


def find_target(name: str) -> Target:
    """The target called ``name``: ``sm89``, ``8.9``, ``89``, ``compute_89`` or a device (``RTX 4090``).

    Raises:
        BadInput: nobody calls a GPU that; the message offers the names closest to it.
    """
    plain = re.sub(r"[\s_.\-]", "", name.lower())
    plain = plain.removeprefix("nvidia").removeprefix("geforce")
    digits = plain.removeprefix("compute").removeprefix("sm")
    found = _BY_NAME.get(f"sm{digits}") or _ALIASES.get(plain)
    if found:
        return found
    known = [*_BY_NAME, *_ALIASES]
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
    raise BadInput(
        f"No target is called {name!r}",
        f"known: {', '.join(_BY_NAME)}, or a device such as rtx4090, a100, h200",
        f"Did you mean {' or '.join(close)}?" if close else "Give a compute capability (sm89) or a device name.",
    )


def support_rows() -> list[tuple[str, ...]]:
    """The table, header first: what the errors, the documentation and ``doctor`` print.

    ``plugins`` marks recipes that a target has with kernels alone.
    """
    rows: list[tuple[str, ...]] = [("target", "architecture", "built by", *PRECISIONS, "devices")]
    for target in TARGETS:
        marks = tuple(_mark(target, precision) for precision in PRECISIONS.values())
        rows.append((target.name, target.architecture, target.package, *marks, ", ".join(target.devices)))
    return rows


def _mark(target: Target, precision: Precision) -> str:
    if target.has(precision):
        return "yes"
    return "plugins" if target.has(precision, plugins=True) else "-"


def buildable(backend: str, present: Sequence[str] = ()) -> tuple[Target, ...]:
    """The targets ``backend`` can build for here; ``present`` names the capabilities of this machine's GPUs."""
    if backend == "tensorrt_rtx":
        return tuple(target for target in TARGETS if target.rtx)
    return tuple(_BY_NAME[name] for name in present if name in _BY_NAME)


def resolve_targets(
    names: Sequence[str] | None,
    precision: Precision,
    backend: str,
    present: Sequence[str] = (),
    plugins: bool = False,
) -> tuple[Target, ...]:
    """The targets to build for, in the table's order, each once.

    Args:
        names: capabilities or devices; None or empty: all that the backend builds for by default and that have
            ``precision``.
        precision: the recipe.
        backend: ``tensorrt_rtx`` or ``tensorrt``.
        present: capabilities of the GPUs in this machine, which are the only ones ``tensorrt`` builds for.
        plugins: whether kernels get in, which read some types where the hardware has them not.

    Raises:
        BadInput: an unknown name, or a target without the recipe's types.
        NotSupported: a target this backend cannot build for here.
    """
    can = buildable(backend, present)
    if not names:
        chosen = tuple(t for t in can if t.has(precision, plugins) and (t.default or backend == "tensorrt"))
        if not chosen:
            raise NotSupported(
                f"{backend} can build for no target with {precision.name} on this machine",
                f"targets it can build for: {_list(can)}",
                _working(precision),
            )
        return chosen
    wanted = {find_target(name) for name in names}
    for target in (t for t in TARGETS if t in wanted):
        if not target.has(precision, plugins):
            raise _without(target, precision, plugins)
        if target not in can:
            raise _not_buildable(target, backend, can)
    return tuple(target for target in TARGETS if target in wanted)


def _without(target: Target, precision: Precision, plugins: bool) -> V4Error:
    needed = precision.types(plugins)
    return BadInput(
        f"{target.name} ({target.architecture}: {', '.join(target.devices[:3])}) has no {precision.name}",
        f"target: {target.name}   --precision {precision.name} needs: {', '.join(needed)}   "
        f"it has: {', '.join(target.types)}",
        _working(precision, target),
    )


def _not_buildable(target: Target, backend: str, can: tuple[Target, ...]) -> V4Error:
    how = {
        "tensorrt": f"Build on a machine with that GPU, where the package tensorrt is installed ({target.devices[0]}).",
        "tensorrt_rtx": "The package tensorrt_rtx builds for it on any machine: --backend tensorrt_rtx.",
    }[target.package]
    return NotSupported(
        f"{backend} cannot build an engine for {target.name} ({target.architecture}) here",
        f"target: {target.name}   targets {backend} can build for here: {_list(can)}",
        how,
    )


def fallback(names: Sequence[str], precision: str, plugins: bool = False) -> tuple[str, str | None]:
    """The precision to export for all of these targets, and what to tell the user where it is another than asked for.

    A precision that no fallback helps is returned as it is; ``resolve_targets`` says what is wrong with it.
    """
    recipe = precision.partition(":")[0]
    if recipe not in FALLBACK:
        return precision, None
    wanted = [target for target in TARGETS if target in {find_target(name) for name in names}]
    asked, instead = PRECISIONS[recipe], PRECISIONS[FALLBACK[recipe]]
    lacking = [target.name for target in wanted if not target.has(asked, plugins)]
    if not lacking or any(not target.has(instead, plugins) for target in wanted):
        return precision, None
    return instead.name, f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} {FALLBACK_NOTES[recipe]}"


def _working(precision: Precision, target: Target | None = None) -> str:
    by = "; ".join(
        f"{package}: {_list(tuple(t for t in TARGETS if t.package == package and t.has(precision)))}"
        for package in PACKAGES
    )
    return f"Targets with {precision.name} ({by}), or another --precision{_instead(precision, target)}."


def _instead(precision: Precision, target: Target | None) -> str:
    other = FALLBACK.get(precision.name.partition(":")[0])
    return f", such as {other}" if other and target and target.has(PRECISIONS[other]) else ""


def _list(targets: tuple[Target, ...]) -> str:
    return ", ".join(target.name for target in targets) or "none"
