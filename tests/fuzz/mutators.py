"""Mutations of JSON that leave it JSON, so that what is behind the parser is reached."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: What is put in the place of a value: edges of numbers, paths that lead out, names that are hard to print.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 127, 4096, 4097, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"), float("inf"), -1.5),
    *("", "\0", ".", "..", "../x", "/etc/passwd", "weights/out", "a/../../b", "x" * 300, "\ud800", "é", "0", "9" * 30),
    *([], {}, [[]], [None], [0], [-1], {"": 0}, [0] * 70, [2**40] * 20),
)


def mutated(data: bytes, prefix: int, rng: random.Random) -> bytes | None:
    """A case with its JSON changed at one to four places; None where it has none."""
    head, text = data[:prefix], data[prefix:]
    try:
        # A header's length says where its JSON ends.
        end = int.from_bytes(head, "little") if prefix == 8 else len(text)
        value = json.loads(text[:end])
        tail = text[end:]
        for _ in range(rng.randint(1, 4)):
            value = _changed(value, rng)
        made = json.dumps(value).encode()
    except (ValueError, RecursionError, OverflowError):
        return None
    if prefix == 8 and rng.random() < 0.9:
        head = len(made).to_bytes(8, "little")
    return head + made + tail


def _changed(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return copy.deepcopy(rng.choice(VALUES))
    holder, key = rng.choice(places)
    _CHANGES[rng.randrange(len(_CHANGES))](holder, key, rng, places)
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _replace(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    holder[key] = copy.deepcopy(rng.choice(VALUES))


def _nudge(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    value = holder[key]
    if isinstance(value, int | float):
        holder[key] = rng.choice((value + 1, value - 1, value * 2, -value, value // 2 if value == value else 0))
    else:
        _replace(holder, key, rng, places)


def _remove(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    del holder[key]


def _copy(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    other, there = rng.choice(places)
    holder[key] = copy.deepcopy(other[there])


def _rename(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    if isinstance(holder, dict):
        names = [name for _, name in places if isinstance(name, str)]
        holder[rng.choice([*names, "", "\0", "../x", "\ud800"])] = holder.pop(key)
    else:
        holder.insert(key, copy.deepcopy(holder[key]))


def _nest(holder: Any, key: Any, rng: random.Random, places: Any) -> None:
    for _ in range(rng.choice((1, 2, 60))):
        holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))


_CHANGES = (_replace, _replace, _nudge, _remove, _copy, _rename, _nest)
