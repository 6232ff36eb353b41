"""How the value of a config key is read and refused; the tables of keys are in ``config/keys.py``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from v4export.errors import BadInput, NotSupported, V4Error

Read = Callable[[str, Any], Any]
REQUIRED = object()
#: Of a dimension: what TensorRT counts by is an int32.
MOST_SIZE = 2**31 - 1
#: Of layers, and of all that is written out once each, such as steps of a thought; far more than any model has.
MOST_LAYERS = 4096


@dataclass(frozen=True)
class Key:
    """How one config key is read.

    Attributes:
        field: the ModelConfig field it fills; ``indexer.top_k`` is a field of what ``indexer`` holds.
        read: from the key and its value to the field's value.
        default: a value to read where the key is absent, or REQUIRED.
        also: another spelling of the key.
    """

    field: str
    read: Read
    default: Any = REQUIRED
    also: str = ""


def wrong_value(key: str, value: Any, wanted: str) -> BadInput:
    """The error for a value of the wrong type or range."""
    return BadInput(f"config key {key} has a value that cannot be used", f"{key} = {value!r}; wanted {wanted}")


def integer(least: int, most: int = MOST_SIZE) -> Read:
    """Reads an integer of at least ``least`` and at most ``most``."""

    def read(key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise wrong_value(key, value, f"an integer of at least {least} and at most {most}")
        return value

    return read


def real(key: str, value: Any) -> float:
    """Reads a finite number above 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # The largest float: an integer may be larger, and is then no float at all.
    if not is_number or not 0 < value <= sys.float_info.max:
        raise wrong_value(key, value, "a finite number above 0")
    return float(value)


def exponent(key: str, value: Any) -> float:
    """Reads a finite number of at least 0."""
    return 0.0 if value == 0 and not isinstance(value, bool) else real(key, value)


def truth(key: str, value: Any) -> bool:
    """Reads true or false."""
    if not isinstance(value, bool):
        raise wrong_value(key, value, "true or false")
    return value


def always(wanted: bool) -> Read:
    """Reads true or false, of which only one has an implementation."""

    def read(key: str, value: Any) -> bool:
        if truth(key, value) is not wanted:
            values = f"{key} = {str(value).lower()}; wanted {str(wanted).lower()}"
            raise NotSupported(f"config key {key} is not supported at this value", values)
        return wanted

    return read


def one_of(*choices: str) -> Read:
    """Reads one of some words; another word is not supported."""

    def read(key: str, value: Any) -> str:
        if value in choices:
            return value
        error = NotSupported if isinstance(value, str) else BadInput
        raise error(f"config key {key} is not supported at this value", f"{key} = {value!r}", f"Use one of {choices}.")

    return read


def or_null(read: Read, null: Any = None) -> Read:
    """Reads null as ``null``, and else as ``read`` does."""
    return lambda key, value: null if value is None else read(key, value)


def tokens(key: str, value: Any) -> tuple[int, ...]:
    """Reads token ids: one, a list, or null."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(integer(0)(key, one) for one in ids)


def counts(key: str, value: Any) -> tuple[int, ...]:
    """Reads a list of integers of at least 0."""
    if not isinstance(value, list):
        raise wrong_value(key, value, "a list of integers")
    return tuple(integer(0)(key, one) for one in value)


size, count, token = integer(1), integer(0), or_null(integer(0))
layers, layer_count = integer(1, MOST_LAYERS), integer(0, MOST_LAYERS)


def table(key: str, value: Any) -> dict[str, Any] | None:
    """Reads an object or null."""
    if value is not None and not isinstance(value, dict):
        raise wrong_value(key, value, "an object or null")
    return value


def read_fields(raw: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The fields that a table of keys fills. Raises BadInput for a missing key, or spellings that disagree."""
    fields = {}
    for name, key in keys.items():
        present = [spelling for spelling in (name, key.also) if spelling in raw]
        if not present and key.default is REQUIRED:
            raise BadInput(f"config key {name} is missing", fix="Use the model's published config.json.")
        values = [key.read(spelling, raw[spelling]) for spelling in present] or [key.read(name, key.default)]
        if any(value != values[0] for value in values):
            raise BadInput(f"config keys {name} and {key.also} disagree", f"{raw[name]!r} and {raw[key.also]!r}")
        fields[key.field] = values[0]
    return fields


def agreed(raw: Mapping[str, Any], readers: Mapping[str, Read], default: Any = REQUIRED) -> Any:
    """What several keys say in different words, each read by its own reader; null says nothing.

    Raises:
        BadInput: they disagree, or none is there and there is no default.
    """
    said = {key: read(key, raw[key]) for key, read in readers.items() if raw.get(key) is not None}
    if not said:
        if default is REQUIRED:
            raise BadInput(
                f"config key {' or '.join(readers)} is missing", fix="Use the model's published config.json."
            )
        return default
    first = next(iter(said))
    for key, value in said.items():
        if value != said[first]:
            raise BadInput(f"config keys {first} and {key} disagree", f"they say {said[first]!r} and {value!r}")
    return said[first]


def refuse_unknown(raw: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises BadInput for keys that are not known, with the closest ones that are."""
    unknown = sorted(set(raw) - known)
    if unknown:
        close = [match for key in unknown for match in difflib.get_close_matches(key, known, 1)]
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise BadInput(
            f"{where} has keys that are not known: {', '.join(unknown)}",
            "; ".join(f"{key} = {raw[key]!r}" for key in unknown[:5]),
            hint + "A key that is not understood may change the maths, so it is not skipped.",
        )


def check_limited(key: str, value: Any, accepted: tuple[Any, ...], error: type[V4Error], why: str = "") -> None:
    """Raises ``error`` where a value is none of those that are supported."""
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
        wanted = " or ".join(map(repr, accepted))
        raise error(f"config key {key} is not supported at this value", f"{key} = {value!r}; wanted {wanted}", why)
