"""Recipes: what ``--precision`` means for every weight, as two tables.

``FORMATS`` says how numbers are stored, ``PRECISIONS`` which format each role of weight has. A user may overrule the
second for some layers or modules (``--keep``); ``native`` is whatever the checkpoint has.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from v4export.config import ModelConfig
from v4export.errors import BadInput, missing_package

#: Always float32, whatever the precision: the router's correction bias decides near ties, and what steers
#: hyper-connections, sinks and pooling is small and stored so.
FLOAT32_ROLES = frozenset({"router_bias", "hyper", "sink", "position_bias"})

#: Roles (``v4export/checkpoint/names.py``) whose matrices a recipe gives a format of their own.
MATRIX_ROLES = ("linear", "expert")

#: Roles that can be given another format than the recipe's; the others are small, and few runtimes take them narrower.
KEEPABLE_ROLES = (*MATRIX_ROLES, "head")

NATIVE = "native"

#: What a recipe's name may be followed by, after a colon: who chooses the multipliers of some formats -> these formats.
SEARCHES = {"modelopt-mse": ("nvfp4",)}

#: Matrices that are multiplied head by head or group by group, cut up and not as a linear layer's. What they multiply
#: is never rounded: in absorbed attention it is a query or a mix of latents, which has no range of its own.
MULTIPLIED_IN_PARTS = ("kv_b_proj", "o_a_proj")


@dataclass(frozen=True)
class Format:
    """How the numbers of a matrix [N, K] are stored.

    Attributes:
        name: in recipes, ``--keep`` and reports.
        dtype: of the numbers.
        bits: of a number.
        block: rows and columns that share a multiplier, 0 columns being all of a row; None where nothing is shared.
        scale: dtype of multipliers in a graph.
        power_of_two: whether multipliers are powers of two.
        outer: whether multipliers are numbers of ``scale`` times a float32 power of two that the matrix has.
        roundoff: unit round-off of a number.
        search: who chooses multipliers, of ``SEARCHES``; "" where this package does.
    """

    name: str
    dtype: str
    bits: int
    block: tuple[int, int] | None = None
    scale: str = ""
    power_of_two: bool = False
    outer: bool = False
    roundoff: float = 2.0**-24
    search: str = ""

    @property
    def packed(self) -> bool:
        """Whether two numbers share a byte, the even column in the low bits."""
        return self.bits == 4

    @property
    def scaled(self) -> bool:
        """Whether there are multipliers."""
        return self.block is not None

    @property
    def types(self) -> tuple[str, ...]:
        """What GPUs call the types of its numbers, and of multipliers that have to be widened, too."""
        names = {f.dtype: f.name for f in PLAIN.values()} | _NARROW
        return (names[self.dtype], *([names[self.scale]] if self.outer else []))

    def columns(self, width: int) -> int:
        """Columns of a block of a matrix that is so wide."""
        assert self.block is not None
        return self.block[1] or width

    def fits(self, width: int) -> bool:
        """Whether rows of so many columns can be stored: a ragged last block is FP8's alone."""
        return self.block is None or self.block[1] in (0, 128) or width % self.block[1] == 0

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a matrix, multipliers included."""
        numbers = rows * width * self.bits // 8
        if self.block is None:
            return numbers
        blocks = -(-rows // self.block[0]) * -(-width // self.columns(width))
        return numbers + blocks * _BYTES[self.scale] + 4 * self.outer


#: dtype -> type of numbers in tables of what a GPU has.
_NARROW = {"float8_e4m3fn": "fp8", "float4_e2m1fn": "fp4", "int8": "int8", "int4": "int4"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}

FORMATS = {
    f.name: f
    for f in (
        Format("fp32", "float32", 32),
        Format("fp16", "float16", 16, roundoff=2.0**-11),
        Format("bf16", "bfloat16", 16, roundoff=2.0**-8),
        # DeepSeek's blocks; a checkpoint's own size of block, where it has one.
        Format("fp8", "float8_e4m3fn", 8, (128, 128), "float32", roundoff=2.0**-4),
        # One multiplier a row, which leaves a product of FP8 numbers to be scaled once.
        Format("fp8-row", "float8_e4m3fn", 8, (1, 0), "float32", roundoff=2.0**-4),
        # OCP Microscaling Formats 1.0; bfloat16 has every power of two that E8M0 has, and TensorRT-RTX reads it.
        Format("mxfp8", "float8_e4m3fn", 8, (1, 32), "bfloat16", power_of_two=True, roundoff=2.0**-4),
        Format("mxfp4", "float4_e2m1fn", 4, (1, 32), "bfloat16", power_of_two=True, roundoff=2.0**-2),
        Format("nvfp4", "float4_e2m1fn", 4, (1, 16), "float8_e4m3fn", outer=True, roundoff=2.0**-2),
        # TensorRT wants an integer's multipliers in the type that it becomes.
        Format("int8", "int8", 8, (1, 32), "bfloat16", roundoff=2.0**-7),
        Format("int4", "int4", 4, (1, 32), "bfloat16", roundoff=2.0**-3),
    )
}

#: Roles whose format no recipe changes.
_FIXED = dict.fromkeys(FLOAT32_ROLES, FORMATS["fp32"]) | {"hash_table": Format("int64", "int64", 64)}

#: dtype of activations -> the format of that name
PLAIN = {f.dtype: f for f in FORMATS.values() if not f.scaled}


@dataclass(frozen=True)
class Keep:
    """An exception to a recipe: the format of the weights that a pattern names.

    Attributes:
        format: their format.
        pattern: alternatives joined by ``|``, each a glob over paths such as ``layers.3.self_attn.q_a_proj``,
            ``layers.3.mlp.experts`` and ``lm_head``, or over ``layers.3.`` and a role (``linear``, ``expert``).
    """

    format: Format
    pattern: str

    @classmethod
    def parse(cls, text: str) -> Keep:
        """What a user gives as ``FORMAT:PATTERN``.

        Raises:
            BadInput: it is not that.
        """
        name, _, pattern = text.partition(":")
        if name not in FORMATS or not pattern.strip("|'\" "):
            raise BadInput(
                f"--keep {text} says nothing",
                f"formats: {', '.join(FORMATS)}",
                "give FORMAT:PATTERN, for example --keep 'bf16:layers.0.*|*.o_proj'",
            )
        return cls(FORMATS[name], pattern.strip("'\""))

    @functools.cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile("|".join(fnmatch.translate(part.strip()) for part in self.pattern.split("|")))

    def matches(self, name: str, role: str) -> bool:
        """Whether it says something of a weight, by its Hub name and role."""
        path = module_path(name)
        layer = re.match(r"(?:layers\.\d+\.)?", path)
        assert layer is not None
        return any(self._expression.fullmatch(one) for one in (path, layer[0] + role))

    def __str__(self) -> str:
        return f"{self.format.name}:{self.pattern}"


def may_round_inputs(name: str, role: str) -> bool:
    """Whether any recipe rounds what a matrix multiplies: a linear layer's or an expert's input."""
    return role in MATRIX_ROLES and name.removesuffix(".weight").rpartition(".")[2] not in MULTIPLIED_IN_PARTS


def module_path(name: str) -> str:
    """What ``--keep`` calls the module of a weight; all experts of a layer are one."""
    path = name.removeprefix("model.").removesuffix(".weight")
    return re.sub(r"(\.experts)\..*", r"\1", path)


@dataclass(frozen=True)
class Precision:
    """A recipe.

    Attributes:
        name: what the user types.
        activations: dtype of activations, state, and of every weight that no format is named for.
        linear: format of linear layers.
        expert: format of routed experts.
        inputs: whether the inputs of these matrices are rounded to FP8 by scales that were calibrated.
        keep: exceptions, of which the first that matches counts.
        state_fp8: whether cached rows are FP8.
        about: what it is good for, in a line.
    """

    name: str
    activations: str
    linear: Format
    expert: Format
    inputs: bool = False
    keep: tuple[Keep, ...] = ()
    state_fp8: bool = False
    about: str = ""

    @property
    def roundoff(self) -> float:
        """Unit round-off of activations."""
        return PLAIN[self.activations].roundoff

    @property
    def plain(self) -> Format:
        """The format of weights that have the activations' type."""
        return PLAIN[self.activations]

    @property
    def unquantised(self) -> str:
        """Name of the recipe with the same activations whose matrices have their type."""
        return PLAIN[self.activations].name

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that weights may have, each once; that of linear layers and experts first."""
        kept = (one.format for one in self.keep)
        return tuple(dict.fromkeys((self.expert, self.linear, *kept, self.plain)))

    def types(self, plugins: bool = False) -> tuple[str, ...]:
        """Types of numbers that a GPU must have for an engine; with kernels, it need not have experts' FP4."""
        read = {self.expert} - {self.linear, *(one.format for one in self.keep)}
        by_kernels = {f for f in read if plugins and f.name == "mxfp4"}
        named = [name for f in (self.plain, *self.formats) if f not in by_kernels for name in f.types]
        named += FORMATS["fp8"].types if self.state_fp8 else ()
        # Routing and attention multiply in float32 in every recipe.
        return tuple(dict.fromkeys(("fp32", *named)))

    @property
    def stored(self) -> tuple[str, ...]:
        """Types of numbers that matrices are stored in: the narrow ones, or that of activations if there are none."""
        narrow = tuple(dict.fromkeys(f.types[0] for f in self.formats if f.scaled))
        return narrow or (self.unquantised,)

    @property
    def quantised(self) -> bool:
        """Whether any weight is widened before it multiplies."""
        return any(f.scaled for f in self.formats)

    def format_of(self, name: str, role: str) -> Format:
        """The format of a weight, by its Hub name and role."""
        if role in _FIXED:
            return _FIXED[role]
        for one in self.keep if role in KEEPABLE_ROLES else ():
            if one.matches(name, role):
                return one.format
        return {"linear": self.linear, "expert": self.expert}.get(role, self.plain)

    def rounds_inputs_of(self, name: str, role: str) -> bool:
        """Whether what a matrix multiplies is rounded to FP8, as the matrix is, by its Hub name and role."""
        return self.inputs and may_round_inputs(name, role) and self.format_of(name, role).dtype == "float8_e4m3fn"

    def with_blocks(self, rows: int, columns: int) -> Precision:
        """This recipe, its FP8 in blocks of that size."""
        return self._changed(("fp8",), block=(rows, columns))

    def searched(self, search: str) -> Precision:
        """This recipe, its multipliers chosen as one of ``SEARCHES`` does.

        Raises:
            BadInput: it is none of them, or changes nothing here.
        """
        known = SEARCHES.get(search, ())
        if not known or not any(one.name in known for one in self.formats):
            can = ", ".join(f"{name} ({' and '.join(formats)})" for name, formats in SEARCHES.items())
            raise BadInput(
                f"--precision {self.name}:{search} is no recipe", f"behind a colon: {can}", "leave the colon out"
            )
        return replace(self._changed(known, search=search), name=f"{self.name}:{search}")

    def _changed(self, names: Sequence[str], **changes: Any) -> Precision:
        """This recipe, the formats of these names changed."""

        def one(format: Format) -> Format:
            return replace(format, **changes) if format.name in names else format

        keep = tuple(replace(each, format=one(each.format)) for each in self.keep)
        return replace(self, linear=one(self.linear), expert=one(self.expert), keep=keep)

    def used(self, roles: Mapping[str, str]) -> Precision:
        """What a graph has of this recipe, by Hub name -> role of its weights; without narrow ones, its plain one."""
        found = {self.format_of(name, role) for name, role in roles.items()}
        keep = tuple(one for one in self.keep if any(one.matches(*weight) for weight in roles.items()))
        linear, expert = (one if one in found else None for one in (self.linear, self.expert))
        some = linear or expert or self.plain
        own = replace(self, linear=linear or some, expert=expert or some, keep=keep)
        return own if own.quantised else replace(own, name=self.unquantised)

    def kept(self, keep: Sequence[str]) -> Precision:
        """This recipe with a user's exceptions, each ``FORMAT:PATTERN``.

        Raises:
            BadInput: a format is unknown, or does not go with these activations.
        """
        found = tuple(map(Keep.parse, keep))
        for one in found:
            if not one.format.scaled and one.format not in (self.plain, FORMATS["fp32"]):
                raise BadInput(
                    f"--keep {one}: {self.name} computes in {self.unquantised}",
                    f"formats: {self.unquantised}, fp32, {', '.join(f.name for f in FORMATS.values() if f.scaled)}",
                    f"keep {self.unquantised}, or take --precision {one.format.name}",
                )
            if one.format.scaled and one.format.scale != "float32" and self.activations != "bfloat16":
                # Their widened numbers are bfloat16, which activations of another type would see rounded.
                raise BadInput(
                    f"--keep {one}: {one.format.name} goes with bf16 activations, and {self.name} has others",
                    fix="take --precision bf16 with it",
                )
        return replace(self, keep=found)

    def check(self, roles: Mapping[str, str]) -> None:
        """Prove that every exception says something of a model, by Hub name -> role of its weights.

        Raises:
            BadInput: a pattern names no matrix, or makes experts float32, which they are not beside others.
            NotSupported: the recipe needs a package that is not installed.
        """
        if any(one.search for one in self.formats) and find_spec("modelopt") is None:
            raise missing_package("nvidia-modelopt", "modelopt", f"--precision {self.name}")
        for one in self.keep:
            matched = {role for name, role in roles.items() if one.matches(name, role)}
            if not matched & {*KEEPABLE_ROLES}:
                paths = list(dict.fromkeys(module_path(n) for n, role in roles.items() if role in KEEPABLE_ROLES))
                raise BadInput(
                    f"--keep {one} changes nothing",
                    f"it names weights that have the same type in every recipe: {', '.join(sorted(matched))}"
                    if matched
                    else f"no matrix is called so; there are {', '.join(paths[:4])}, .., {paths[-1]}",
                    "give paths such as 'lm_head', 'layers.0.*', '*.o_proj', or '*.expert'",
                )
            if "expert" in matched and not one.format.scaled and one.format != self.plain:
                raise BadInput(
                    f"--keep {one}: experts are {self.unquantised} or narrower beside {self.unquantised} activations",
                    fix=f"keep {self.unquantised} for them, or take --precision fp32",
                )


_F = FORMATS
PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", "float32", _F["fp32"], _F["fp32"], about="the reference"),
        Precision("fp16", "float16", _F["fp16"], _F["fp16"], about="three digits more than bf16; may overflow"),
        Precision("bf16", "bfloat16", _F["bf16"], _F["bf16"], about="as most checkpoints are"),
        Precision("fp8", "bfloat16", _F["fp8"], _F["fp8"], about="DeepSeek's blocks, weights alone"),
        Precision("mxfp8", "bfloat16", _F["mxfp8"], _F["mxfp8"], about="OCP blocks of 32, weights alone"),
        Precision(
            "fp8-w8a8", "bfloat16", _F["fp8-row"], _F["fp8-row"], inputs=True, about="FP8 products; needs --calibrate"
        ),
        Precision("mxfp4", "bfloat16", _F["fp8"], _F["mxfp4"], about="experts as OCP FP4, as V4 checkpoints are"),
        Precision("nvfp4", "bfloat16", _F["fp8"], _F["nvfp4"], about="experts as NVIDIA's FP4, closer than mxfp4"),
        Precision("int8", "bfloat16", _F["int8"], _F["int8"], about="for Ampere; blocks of 32, weights alone"),
        Precision("int4", "bfloat16", _F["int8"], _F["int4"], about="for Ampere; experts in blocks of 32"),
    )
}


def precision(name: str, config: ModelConfig | None = None, keep: Sequence[str] = ()) -> Precision:
    """The recipe of that name for a model; its FP8 blocks are those that the model's checkpoint has, where it has any.

    Args:
        name: of ``PRECISIONS``, or ``native``; one of ``SEARCHES`` may follow, after a colon.
        config: the model.
        keep: exceptions, each ``FORMAT:PATTERN``.

    Raises:
        BadInput: there is none, or ``native`` is asked for and nobody knows of which checkpoint.
    """
    if name == NATIVE and config is not None:
        name = native(config)
    name, _, search = name.partition(":")
    if name not in PRECISIONS:
        raise BadInput(
            f"unknown precision {name!r}", f"known: {', '.join((*PRECISIONS, NATIVE))}", "choose one of them"
        )
    found, stored = PRECISIONS[name].kept(keep), config.fp8 if config else None
    found = replace(found, state_fp8=config is not None and config.state_fp8)
    found = found.searched(search) if search else found
    return found.with_blocks(stored.rows, stored.columns) if stored else found


def native(config: ModelConfig) -> str:
    """Name of the recipe whose formats the checkpoint has."""
    if config.fp4_experts:
        return "mxfp4"
    return "fp8" if config.fp8 else PLAIN.get(config.dtype, FORMATS["bf16"]).name


def recipe_rows() -> list[tuple[str, ...]]:
    """The table of recipes, header first."""
    rows: list[tuple[str, ...]] = [("--precision", "activations", "linear layers", "experts", "inputs", "")]
    for p in PRECISIONS.values():
        inputs = "fp8" if p.inputs else p.unquantised
        rows.append((p.name, p.unquantised, p.linear.name, p.expert.name, inputs, p.about))
    return [*rows, (NATIVE, "", "", "", "", "the formats that the checkpoint has")]


def format_rows() -> list[tuple[str, ...]]:
    """The table of formats, header first."""
    rows: list[tuple[str, ...]] = [("format", "numbers", "bits a weight", "share a multiplier", "multipliers")]
    for f in FORMATS.values():
        if f.block is None:
            rows.append((f.name, f.dtype, str(f.bits), "", ""))
            continue
        across = " x ".join(map(str, f.block)) if f.block[1] else "a row"
        scale = f.scale + (", powers of two" if f.power_of_two else "") + (" times a power of two" if f.outer else "")
        rows.append((f.name, f.dtype, f"{8 * f.nbytes(4096, 4096) / 4096**2:.4g}", across, scale))
    return rows
