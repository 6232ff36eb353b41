"""Results as strict JSON: dataclasses as objects, and no NaN or infinity, which JSON does not have; and back."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def to_json(value: Any) -> str:
    """Indented JSON; a float that is not finite becomes null, what JSON has no form for becomes text."""
    return json.dumps(plain(value), indent=1, allow_nan=False)


def plain(value: Any) -> Any:
    """A value as JSON has them: dataclasses as objects, tuples as lists, what else JSON lacks as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def from_plain(kind: Any, value: Any) -> Any:
    """What ``to_json`` has made JSON of, once that is parsed: dataclasses, tuples and paths by their declared types.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: it is something else.
    """
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        given = {f.name: from_plain(hints[f.name], value[f.name]) for f in dataclasses.fields(kind) if f.init}
        return typing.cast(type, kind)(**given)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else from_plain(next(one for one in of if one is not type(None)), value)
    if origin is tuple:
        kinds = of[:1] * len(value) if of[1:] == (...,) else of
        return tuple(from_plain(one, item) for one, item in zip(kinds, value, strict=True))
    if origin in (list, Sequence):
        return [from_plain(of[0], item) for item in value]
    if origin in (dict, Mapping):
        return {key: from_plain(of[1], item) for key, item in value.items()}
    if kind is Any:
        return value
    if kind is Path:
        return Path(value)
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value
