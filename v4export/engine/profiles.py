"""Optimisation profiles: for each named dimension a least, a likely and a largest size, then shapes derived by name.

Letters: B batch, S new tokens, T cached tokens, Q positions whose logits are wanted; T/n and S/n rows that each stand
for n tokens; P earlier steps of a thought. What one stage of a pipeline reads of another: M tokens of all sequences, K
and N what was selected for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from v4export.errors import BadInput
from v4export.plugins.limits import MAX_TOPK

Size = tuple[int, int, int]
Dim = int | str
Shapes = Mapping[str, tuple[int, ...]]
BOUNDS = ("min", "opt", "max")
#: The letters of rows that grow with a sequence or come with a step, alone or divided by the tokens of a row.
CACHED, NEW = "T", "S"


@dataclass(frozen=True)
class Profile:
    """One profile: (least, likely, largest) shape of every input that has a dynamic dimension."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class ShapeOverride:
    """Shapes a user gave in the syntax of trtexec; they replace the derived profiles by a single one."""

    min: Shapes = field(default_factory=dict)
    opt: Shapes = field(default_factory=dict)
    max: Shapes = field(default_factory=dict)

    @classmethod
    def parse(cls, min: str | None, opt: str | None, max: str | None) -> ShapeOverride:
        """From the texts of --minShapes, --optShapes and --maxShapes, any of which may be left out."""
        return cls(*(parse_shapes(text) if text else {} for text in (min, opt, max)))

    def __bool__(self) -> bool:
        return bool(self.min or self.opt or self.max)


def dim_table(max_batch: int, max_seq_len: int, max_chunk: int, max_steps: int = 1) -> dict[str, dict[str, Size]]:
    """Sizes of each letter, by profile. A chunk of one token needs no profile of its own.

    Whoever runs the graph gives it one cached row at least, since operators refuse to gather from none.
    """
    given = {"max_batch": max_batch, "max_seq_len": max_seq_len, "max_chunk": max_chunk, "max_steps": max_steps}
    for name, value in given.items():
        if value < 1:
            raise BadInput(f"{name} must be at least 1", f"{name}: {value}", f"Give a larger {name}.")
    cached = (1, max(1, max_seq_len // 2), max_seq_len)
    chunk = (1, max_chunk, max_chunk)
    both: dict[str, Size] = {CACHED: cached, "P": (0, max_steps // 2, max_steps - 1)}
    table = {"decode": {"B": (1, max_batch, max_batch), "S": (1, 1, 1), "Q": (1, 1, 1), **both}}
    if max_chunk > 1:
        table["prefill"] = {"B": (1, 1, max_batch), "S": chunk, "Q": (1, 1, max_chunk), **both}
    selected = (1, MAX_TOPK // 4, MAX_TOPK)
    for sizes in table.values():
        least, likely, most = (b * s for b, s in zip(sizes["B"], sizes[NEW], strict=True))
        sizes |= {"M": (least, likely, most), "K": selected, "N": selected}
    return table


def input_dims(model: onnx.ModelProto | Path) -> dict[str, tuple[Dim, ...]]:
    """Each graph input's dimensions: a number, a name, or "" for an unknown one without a name."""
    proto = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    constants = {tensor.name for tensor in proto.graph.initializer}
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim
        )
        for value in proto.graph.input
        if value.name not in constants
    }


def derive_profiles(
    inputs: Mapping[str, Sequence[Dim]],
    *,
    max_batch: int,
    max_seq_len: int,
    max_chunk: int,
    max_steps: int = 1,
    override: ShapeOverride | None = None,
) -> tuple[Profile, ...]:
    """The profiles of a graph with these inputs: decode and prefill, or the single one the user's shapes make.

    A graph without dynamic dimensions has none.

    Raises:
        BadInput: a dynamic dimension with no size, or shapes that do not fit the inputs.
    """
    if not any(isinstance(dim, str) for dims in inputs.values() for dim in dims):
        return ()
    table = dim_table(max_batch, max_seq_len, max_chunk, max_steps)
    if override:
        return (_overridden(inputs, override, table),)
    return tuple(Profile(name, _shapes(inputs, sizes, {})) for name, sizes in table.items())


def most_sequences(profiles: Sequence[Profile], asked: int) -> int:
    """Of a step, where a user's own shapes may have others than were asked for."""
    return max((one.shapes["position"][2][0] for one in profiles if "position" in one.shapes), default=asked)


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """trtexec's ``name:1x4,other:1`` as a dictionary. Names may hold colons; the shape follows the last one.

    Raises:
        BadInput: a part without a shape, a size that is no number, or a name given twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, colon, sizes = part.rpartition(":")
        name = name.strip().strip("'\"")
        if not colon or not name:
            raise _bad_shapes("a part has no NAME:SHAPE", part)
        if name in shapes:
            raise _bad_shapes(f"{name} is given twice", part)
        dims = [] if sizes.strip() == "scalar" else sizes.strip().lower().split("x")
        if not all(dim.isdecimal() for dim in dims):
            raise _bad_shapes("a shape is not numbers joined by x", part)
        shapes[name] = tuple(int(dim) for dim in dims)
    if not shapes:
        raise _bad_shapes("it is empty", text)
    return shapes


def _bad_shapes(what: str, part: str) -> BadInput:
    return BadInput(f"Shapes cannot be read: {what}", f"given: {part!r}", "Write input_ids:1x4,position:1")


def _shapes(
    inputs: Mapping[str, Sequence[Dim]], sizes: Mapping[str, Size], given: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    result = {}
    for name, dims in inputs.items():
        if not any(isinstance(dim, str) for dim in dims):
            continue
        low, likely, high = (
            given.get(bound, {}).get(name) or _shape(name, dims, sizes, i) for i, bound in enumerate(BOUNDS)
        )
        if not all(a <= b <= c for a, b, c in zip(low, likely, high, strict=True)):
            raise BadInput(
                f"Shapes of {name} are not in order",
                f"min {low}   opt {likely}   max {high}",
                "Every size must satisfy min <= opt <= max.",
            )
        result[name] = (low, likely, high)
    return result


def _shape(name: str, dims: Sequence[Dim], sizes: Mapping[str, Size], bound: int) -> tuple[int, ...]:
    shape = []
    for axis, dim in enumerate(dims):
        size = _size(dim, sizes) if isinstance(dim, str) else (dim, dim, dim)
        if size is None:
            raise BadInput(
                f"Nothing says how large axis {axis} of input {name} may be",
                f"its name: {dim or 'none'}   names with a size: {', '.join(sizes)}, {CACHED}/2, {CACHED}/3 and so on",
                f"Name the dimension so, or give --minShapes/--optShapes/--maxShapes for {name}.",
            )
        shape.append(size[bound])
    return tuple(shape)


def _size(name: str, sizes: Mapping[str, Size]) -> Size | None:
    """Sizes of a named dimension; of rows for every n tokens, those that the tokens' sizes make.

    A sequence alone binds the rows its tokens complete. Several bind whole buffers, which have one row more, for the
    row that a step returns and does not complete.
    """
    if name in sizes:
        return sizes[name]
    letter, _, every = name.partition("/")
    if letter not in (CACHED, NEW) or not every.isdecimal() or int(every) < 1:
        return None
    if letter == NEW:
        least, likely, most = (-(-tokens // int(every)) for tokens in sizes[NEW])
        return least, likely, most
    least, likely, most = (tokens // int(every) for tokens in sizes[CACHED])
    return max(1, least), max(1, likely), most + 1


def _overridden(
    inputs: Mapping[str, Sequence[Dim]], override: ShapeOverride, table: Mapping[str, Mapping[str, Size]]
) -> Profile:
    """One profile from the user's shapes; a letter they fix on one input has that size on the others too."""
    given = _complete(override)
    for name in sorted({name for shapes in given.values() for name in shapes}):
        if name not in inputs:
            raise BadInput(
                f"Shapes are given for {name}, which is no input", f"inputs: {', '.join(inputs)}", "Correct the name."
            )
    sizes: dict[str, Size] = {}
    for rows in table.values():
        for letter, size in rows.items():
            least, _, most = sizes.get(letter, size)
            sizes[letter] = (min(least, size[0]), size[1], max(most, size[2]))
    sizes |= _letters(inputs, given)
    return Profile("given", _shapes(inputs, sizes, given))


def _complete(override: ShapeOverride) -> dict[str, dict[str, tuple[int, ...]]]:
    """A bound left out is filled as trtexec does: from the likely shape, else from the nearest bound given."""
    fallback = {"min": ("opt", "max"), "opt": ("max", "min"), "max": ("opt", "min")}
    given = {bound: dict(getattr(override, bound)) for bound in BOUNDS}
    filled = {bound: dict(shapes) for bound, shapes in given.items()}
    for bound, others in fallback.items():
        for other in others:
            for name, shape in given[other].items():
                filled[bound].setdefault(name, shape)
    return filled


def _letters(
    inputs: Mapping[str, Sequence[Dim]], given: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, Size]:
    sizes: dict[str, Size] = {}
    for name in given["opt"]:
        dims, shapes = inputs[name], [given[bound][name] for bound in BOUNDS]
        for bound, shape in zip(BOUNDS, shapes, strict=True):
            pairs = zip(dims, shape, strict=False)
            fits = len(shape) == len(dims) and all(isinstance(dim, str) or dim == size for dim, size in pairs)
            if not fits:
                raise BadInput(
                    f"The {bound} shape of {name} does not fit the input",
                    f"given: {'x'.join(map(str, shape))}   the input: {'x'.join(str(d or '?') for d in dims)}",
                    "Give one size an axis, and fixed axes their own size.",
                )
        for axis, dim in enumerate(dims):
            if not isinstance(dim, str) or not dim:
                continue
            size = (shapes[0][axis], shapes[1][axis], shapes[2][axis])
            if sizes.setdefault(dim, size) != size:
                raise BadInput(
                    f"The shapes given disagree about dimension {dim}",
                    f"{name}: {size}   another input: {sizes[dim]} (min, opt, max)",
                    f"Give {dim} the same sizes on every input.",
                )
    return sizes
